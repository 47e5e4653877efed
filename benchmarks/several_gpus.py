"""A training run on one GPU and on several of one machine: seconds of rollout, update and weight transfer.

    PYTHONPATH=. python benchmarks/several_gpus.py --gpus 1 2 --out benchmarks/results/several_gpus.json

The policy has Qwen2.5-1.5B's shape and random weights, so every completion has --max-new-tokens tokens and every group
is in the update; rewards are made up. On n GPUs, learner i and rollout worker i share GPU i; learners shard parameters,
gradients and optimizer over NCCL. `apart` has the learner on one GPU and the rollout worker on another. The work of a
step is the same for all. The first step, which compiles and captures, is not counted; nor are records and checkpoints,
which are not written.
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


def main(given: list[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    settings = vars(arguments).copy()
    out, layouts, seconds = settings.pop("out"), settings.pop("gpus"), settings.pop("layout_seconds")
    result: dict[str, Any] = {"work": settings, "layouts": {}}

    def run(layout: str, folder: Path) -> dict[str, Any]:
        asked = settings | {"layout": layout}
        return run_alone("benchmarks.several_gpus:measure", asked, folder, seconds=seconds)

    with tempfile.TemporaryDirectory() as scratch:
        settings["policy"] = settings["policy"] or str(Path(scratch) / "policy")
        run_each(result, "layouts", layouts, run, shown, out)
    return 1 if any("failed" in record for record in result["layouts"].values()) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gpus", nargs="+", default=["1", "2"], help="numbers of GPUs, or `apart`")
    made.add_argument("--policy", help="a folder with a policy; it is made there if absent. Default: made and removed")
    made.add_argument("--shape", default="qwen2.5-1.5b", help="see weight_sync.py")
    made.add_argument("--prompts", type=int, default=64)
    made.add_argument("--completions", type=int, default=8)
    made.add_argument("--max-new-tokens", type=int, default=256)
    made.add_argument("--tokens-per-microbatch", type=int, default=16384)
    made.add_argument("--steps", type=int, default=4, help="that are counted")
    made.add_argument("--layout-seconds", type=float, default=300, help="a layout's process is killed after so many")
    made.add_argument("--out", type=Path)
    return made


def varied(verdict: Any, response: str, truncated: bool) -> float:
    """A reward that differs within groups, so that all of them have a gradient."""
    return len(response) % 7 / 6


def measure(settings: dict[str, Any], keep: Keep) -> None:
    """Steps as a run takes them, without its records and checkpoints."""
    from benchmarks.rl_bench import machine
    from benchmarks.weight_sync import make_policy
    from plumbline.rl.batch import Sampling
    from plumbline.rl.cluster import Roles
    from plumbline.rl.records import training_batch
    from plumbline.rl.tasks import training_tasks
    from plumbline.rl.text import Codec

    keep({"machine": machine()})
    make_policy(settings)
    run = config(settings)
    tasks = list(training_tasks(run, Codec(run.policy.path))[0].tasks.values())
    steps: list[dict[str, float]] = []
    began = time.perf_counter()
    with Roles.start(run) as roles:
        roles.begin(run)
        roles.sync()
        keep({"start_seconds": time.perf_counter() - began})
        for step in range(1 + settings["steps"]):
            first = step * settings["prompts"]
            prompts = [
                tasks[(first + index) % len(tasks)].prompt(index, key=step) for index in range(settings["prompts"])
            ]
            clock = time.perf_counter()
            sampling = Sampling(settings["max_new_tokens"], seed=step)
            groups = list(roles.graded_groups(prompts, settings["completions"], sampling))
            rolled = time.perf_counter()
            groups.sort(key=lambda group: group.prompt.index)
            metrics = roles.update(training_batch(groups))()
            updated = time.perf_counter()
            roles.sync()
            end = time.perf_counter()
            tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
            steps.append(
                {
                    "step_seconds": end - clock,
                    "rollout_seconds": rolled - clock,
                    "update_seconds": updated - rolled,
                    "sync_seconds": end - updated,
                    "completion_tokens": tokens,
                    "rollout_tokens_per_second": tokens / (rolled - clock),
                    "loss": metrics["learner/loss"],
                    "gradient_norm": metrics["learner/gradient_norm"],
                }
            )
            counted = steps[1:]
            if counted:
                keep({"median": {name: statistics.median(step[name] for step in counted) for name in steps[0]}})
            keep({"steps": steps})


def config(settings: dict[str, Any]) -> Any:
    from benchmarks.rl_bench import DEVICE
    from plumbline.rl.config import parse_config

    apart = settings["layout"] == "apart"
    workers = 1 if apart else int(settings["layout"])
    share = (1 if apart else 0.5) if DEVICE == "cuda" else 0
    precision = "bfloat16" if DEVICE == "cuda" else "float32"
    return parse_config(
        {
            "name": "several_gpus",
            "policy": {"path": settings["policy"], "device": DEVICE},
            "data": {"source": "procedural:train", "limit": 1000},
            "rollout": {
                "workers": workers,
                "gpus_per_worker": share,
                "precision": precision,
                "prompts_per_step": settings["prompts"],
                "completions_per_prompt": settings["completions"],
                "max_new_tokens": settings["max_new_tokens"],
                "slots": settings["prompts"] * settings["completions"] // workers,
            },
            "learner": {
                "workers": workers,
                "gpus": share,
                "precision": precision,
                "tokens_per_microbatch": settings["tokens_per_microbatch"],
            },
            "reward": {
                "workers": 2,
                "processes_per_worker": 4,
                "shaping": "benchmarks.several_gpus:varied",
                "checking": {"share": 0},
            },
            "ray": {"dashboard": False},
        }
    )


def shown(layout: str, record: dict[str, Any]) -> Iterator[str]:
    yield f"{layout} GPU{'s' * (layout != '1')} (process {record.get('process_seconds', 0):.0f} s)"
    yield from failure(record)
    for name, value in record.get("median", {}).items():
        yield f"  {name:28s} {value:14,.3f}"


if __name__ == "__main__":
    sys.exit(main())
