"""Seconds until a rollout engine holds the learner's new weights, for a policy of 1.5B parameters on one card.

    PYTHONPATH=. python benchmarks/weight_sync.py --out benchmarks/results/weight_sync.json

The policy has Qwen2.5-1.5B's shape and random weights; the learner's are float32, the engine's bfloat16.

    in-process    learner and engine share a process: policy_weights, then load_weights, as rl_step.py does
    actors        learner and rollout worker are Ray actors, as in a training run, each with half of the card: publish,
                  then load_weights, both with their checksums
    actors-host   the same through the host's memory, as between machines; not measured unless asked for

Each way runs in a process of its own; --out is written after each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import Keep, failure, run_alone, run_each

WAYS = {
    "in-process": "benchmarks.weight_sync:in_process",
    "actors": "benchmarks.weight_sync:actors",
    "actors-host": "benchmarks.weight_sync:actors_through_host",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "qkv_bias": True,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
}


def main(given: list[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    settings = vars(arguments).copy()
    out, ways, seconds = settings.pop("out"), settings.pop("ways"), settings.pop("way_seconds")
    result: dict[str, Any] = {"work": settings, "ways": {}}

    def run(way: str, folder: Path) -> dict[str, Any]:
        return run_alone(WAYS[way], settings, folder, seconds=seconds)

    with tempfile.TemporaryDirectory() as scratch:
        settings["policy"] = str(Path(scratch) / "policy")
        run_each(result, "ways", ways, run, shown, out)
    return 1 if any("failed" in record for record in result["ways"].values()) else 0


def shown(way: str, record: dict[str, Any]) -> Iterator[str]:
    yield f"{way} (process {record['process_seconds']:.0f} s)"
    yield from failure(record)
    if "seconds" in record:
        times = ", ".join(f"{taken:.4f}" for taken in record["seconds"])
        yield f"  {record['parameters'] / 1e9:.2f}B parameters: {record['median']:.4f} s ({times})"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=["in-process", "actors"])
    made.add_argument("--repeats", type=int, default=5, help="after one transfer that is not counted")
    made.add_argument("--way-seconds", type=float, default=200, help="a process is killed after so many")
    made.add_argument("--out", type=Path)
    return made


def in_process(settings: dict[str, Any], keep: Keep) -> None:
    import torch

    from benchmarks.rl_bench import DEVICE, machine, now
    from plumbline.rl.learner import Learner
    from plumbline.rl.learner_state import policy_weights
    from plumbline.rl.rollout import absolute_sum
    from plumbline.rl.rollout.native import NativeEngine

    keep({"machine": machine()})
    make_policy(settings)
    codec: Any = None  # nothing is generated
    dtype = torch.bfloat16
    engine = NativeEngine(settings["policy"], attention=None, codec=codec, slots=1, device=DEVICE, dtype=dtype)
    learner = Learner(config(settings), DEVICE)
    seconds = []
    for version in range(1 + settings["repeats"]):
        change(learner.policy)
        began = now()
        engine.load_weights(version, policy_weights(learner))
        seconds.append(now() - began)
    sent = absolute_sum(tensor.to(dtype) for tensor in policy_weights(learner).values())
    if abs(engine.checksum() - sent) > 1e-9 * sent:
        raise RuntimeError(f"the engine holds other weights: {engine.checksum()}, not {sent}")
    keep(summary(learner.policy, seconds))


def actors(settings: dict[str, Any], keep: Keep) -> None:
    _actors(settings, keep, through_host=False)


def actors_through_host(settings: dict[str, Any], keep: Keep) -> None:
    _actors(settings, keep, through_host=True)


def _actors(settings: dict[str, Any], keep: Keep, *, through_host: bool) -> None:
    """The learner's actor and one rollout worker; nothing else of a run is started but its reward worker."""
    import torch

    from benchmarks.rl_bench import machine
    from plumbline.models.load import policy_config
    from plumbline.models.policy import Policy
    from plumbline.rl.cluster import Roles

    keep({"machine": machine()})
    make_policy(settings)
    run = config(settings)
    with Roles.start(run) as roles:
        roles.begin(run)
        if through_host:
            roles.cards = {}  # as if no two of them were on one card
        seconds = []
        for _ in range(1 + settings["repeats"]):
            began = time.perf_counter()
            roles.sync()
            seconds.append(time.perf_counter() - began)
    with torch.device("meta"):
        keep(summary(Policy(policy_config(settings["policy"])), seconds))


def summary(policy: Any, seconds: list[float]) -> dict[str, Any]:
    counted = seconds[1:]
    return {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "first_seconds": seconds[0],
        "seconds": counted,
        "median": statistics.median(counted),
    }


def change(policy: Any) -> None:
    """New weights, as after an optimizer step."""
    import torch

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.001)


def config(settings: dict[str, Any]) -> Any:
    from benchmarks.rl_bench import DEVICE
    from plumbline.rl.config import parse_config

    share = 0.5 if DEVICE == "cuda" else 0
    return parse_config(
        {
            "name": "weight_sync",
            "policy": {"path": settings["policy"], "device": DEVICE},
            "rollout": {"precision": "bfloat16", "slots": 2, "gpus_per_worker": share},
            "learner": {"precision": "bfloat16", "gpus": share},
            "ray": {"dashboard": False},
        }
    )


def make_policy(settings: dict[str, Any]) -> None:
    """A folder with random bfloat16 weights, and the embedded policy's tokenizer, which no one uses; made once."""
    import torch

    from benchmarks.rl_bench import random_policy
    from plumbline.rl.text import Codec

    random_policy(Path(settings["policy"]), SHAPES[settings["shape"]], torch.bfloat16, Codec("embedded"))


if __name__ == "__main__":
    sys.exit(main())
