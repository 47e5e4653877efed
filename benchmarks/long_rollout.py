"""Long responses: Native Sparse Attention against full attention in the same policy, rollout and update.

    PYTHONPATH=. python benchmarks/long_rollout.py --out benchmarks/results/long_rollout.json

The policy has SmolLM2-135M's shape, random weights, and positions for the longest response; the sparse one is converted
from it. What the tokens are does not matter to the time, and no response ends early.

**Rollout** is the native engine's: captured steps, its draws and its looks at what has ended. A response of 16k tokens
is not drawn whole. At several contexts between its first token and its last, a prompt of that length is read and copied
to every slot, and --measure-tokens tokens are drawn; the time of a token in between is taken from the line through its
neighbours, and the sum over the response is the time of the rollout. The cache is made for the whole response
throughout, as it would be. Reading the prompts is not in it.

**Update** is one optimizer step of the learner on whole sequences (a prompt and a response of that length each), one
sequence a microbatch: forward, backward and AdamW, bfloat16 arithmetic; the first, which compiles, is not counted.
Peak memory is what torch's allocator gave out at most, beginning with nothing.

Each kind of attention runs in a process of its own; one that fails or is cut off leaves what it had measured, and --out
is written after each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import Keep, failure, run_alone, run_each

KINDS = ("full", "nsa")
PARTS = ("rollout", "update")
# SmolLM2-135M; `tiny` is for trying the script out on a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


class Endless:
    """Stands in for a codec: no token ends a response, and nobody reads its text."""

    end_ids = frozenset({-1})

    def decode(self, token_ids: list[int]) -> str:
        return ""


def main(given: list[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    settings = vars(arguments).copy()
    out, kinds, seconds = settings.pop("out"), settings.pop("kinds"), settings.pop("kind_seconds")
    result: dict[str, Any] = {"work": settings, "kinds": {}}

    def run(kind: str, folder: Path) -> dict[str, Any]:
        record = run_alone("benchmarks.long_rollout:measure", settings | {"attention": kind}, folder, seconds=seconds)
        result["ratios"] = ratios(result["kinds"] | {kind: record})
        return record

    with tempfile.TemporaryDirectory() as scratch:
        settings["policy"] = str(Path(scratch) / "policy")
        run_each(result, "kinds", kinds, run, shown, out)
    for length, row in result["ratios"].items():
        print(f"full / nsa at {length}: " + ", ".join(f"{name} {value:.2f}x" for name, value in row.items()))
    rows = [row for record in result["kinds"].values() for part in PARTS for row in record.get(part, {}).values()]
    return 1 if any("failed" in row for row in [*result["kinds"].values(), *rows]) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="smollm2")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--lengths", nargs="+", type=int, default=[16384, 32768], help="tokens of a response")
    made.add_argument("--prompt-tokens", type=int, default=256)
    made.add_argument("--sequences", type=int, default=32, help="decoded side by side")
    made.add_argument("--contexts", type=int, default=5, help="contexts at which decoding is timed, ends included")
    made.add_argument("--measure-tokens", type=int, default=80, help="tokens drawn at each; the first 16 are not timed")
    made.add_argument("--update-sequences", type=int, default=2, help="of an optimizer step; 0 leaves updates out")
    made.add_argument("--updates", type=int, default=2, help="optimizer steps that are counted")
    made.add_argument("--kind-seconds", type=float, default=150, help="a process is killed after so many")
    made.add_argument("--out", type=Path)
    return made


def measure(settings: dict[str, Any], keep: Keep) -> None:
    """All of one kind of attention, in this process."""
    import torch

    from benchmarks.rl_bench import DEVICE, machine

    keep({"machine": machine()})
    make_policy(settings)
    parts = {"rollout": rollout} | ({"update": update} if settings["update_sequences"] else {})
    for name, part in parts.items():
        rows: dict[str, Any] = {}
        for length in settings["lengths"]:
            try:
                rows[str(length)] = part(settings, length)
            except RuntimeError as error:  # memory that does not suffice, above all; the next part may well fit
                traceback.print_exc()
                rows[str(length)] = {"failed": " ".join(str(error).split())[:300]}
            keep({name: rows})
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def make_policy(settings: dict[str, Any]) -> None:
    """A folder with random weights, full attention, in bfloat16 on a GPU; kept if it is there already."""
    import torch

    from benchmarks.rl_bench import DEVICE, random_policy

    positions = settings["prompt_tokens"] + max(settings["lengths"])
    shape = SHAPES[settings["shape"]] | {"max_position_embeddings": positions}
    random_policy(Path(settings["policy"]), shape, torch.bfloat16 if DEVICE == "cuda" else torch.float32)


def rollout(settings: dict[str, Any], length: int) -> dict[str, Any]:
    """Seconds of a token at several contexts, and what they come to over the response."""
    import torch

    from benchmarks.rl_bench import DEVICE, peak_gib
    from plumbline.rl.rollout.native import STEPS_PER_LOOK, NativeEngine

    prompt, count, sequences = settings["prompt_tokens"], settings["measure_tokens"], settings["sequences"]
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    codec: Any = Endless()
    engine = NativeEngine(
        settings["policy"],
        attention=settings["attention"],
        codec=codec,
        slots=sequences,
        device=DEVICE,
        dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32,
    )
    # Room for the tokens drawn there, in whole looks, and for one look more: no sequence ends while the clock runs.
    room = (-(-count // STEPS_PER_LOOK) + 1) * STEPS_PER_LOOK
    last = prompt + length - room
    parts = settings["contexts"] - 1
    # The longest first: the cache that it asks for is kept for the others.
    contexts = [prompt + (last - prompt) * part // parts for part in range(parts, -1, -1)]
    seconds = {context: seconds_a_token(engine, context, room, sequences) for context in contexts}
    whole = over_response(seconds, prompt, length)
    return {
        "seconds_a_token": {str(context): seconds[context] for context in reversed(contexts)},
        "rollout_seconds": whole,
        "tokens_per_second": sequences * length / whole,
        "sequences": sequences,
        "torch_peak_gib": peak_gib(),
    }


def seconds_a_token(engine: Any, context: int, room: int, sequences: int) -> float:
    """Of the engine's loop, each sequence getting one token, with `context` tokens in its cache or a few more."""
    import torch

    from benchmarks.rl_bench import now
    from plumbline.rl.batch import Prompt, Sampling
    from plumbline.rl.rollout.native import STEPS_PER_LOOK

    vocab = engine.policy.config.vocab_size
    ids = torch.randint(vocab, (context,), generator=torch.Generator().manual_seed(context)).tolist()
    parts = engine.generate_in_parts([Prompt(0, "long", ids, "", "")], sequences, Sampling(room))
    next(parts)  # reads the prompt, captures, and draws the first tokens
    # One call of a captured engine is one look; another one's is a token.
    steps = STEPS_PER_LOOK if engine.on_device else 1
    calls = room // steps - 2
    began = now()
    for _ in range(calls):
        next(parts)
    taken = now() - began
    parts.close()
    return taken / (calls * steps)


def over_response(seconds: dict[int, float], prompt: int, length: int) -> float:
    """Sum over the response of a token's seconds, on straight lines between the contexts; level beyond them."""
    places = sorted(seconds)
    total = sum((b - a) * (seconds[a] + seconds[b]) / 2 for a, b in pairwise(places))
    before, after = places[0] - prompt, prompt + length - places[-1]
    return total + before * seconds[places[0]] + after * seconds[places[-1]]


def update(settings: dict[str, Any], length: int) -> dict[str, Any]:
    """One optimizer step on whole sequences."""
    import math

    import torch

    from benchmarks.rl_bench import DEVICE, now, peak_gib
    from plumbline.rl.batch import TrainingBatch
    from plumbline.rl.config import parse_config
    from plumbline.rl.learner import Learner

    prompt, count = settings["prompt_tokens"], settings["update_sequences"]
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config = parse_config(
        {
            "name": "long_rollout",
            "policy": {"path": settings["policy"], "attention": settings["attention"], "device": DEVICE},
            "rollout": {"prompts_per_step": 1, "completions_per_prompt": max(2, count), "max_new_tokens": length},
            "learner": {
                "precision": "bfloat16" if DEVICE == "cuda" else "float32",
                "tokens_per_microbatch": prompt + length,
                "logprob_chunk_tokens": 8192,
            },
            "algorithm": {"advantage": "grpo", "aggregation": "token"},
        }
    )
    learner = Learner(config, DEVICE)
    vocab = learner.policy.config.vocab_size
    made = torch.Generator().manual_seed(length)

    def tokens(size: int) -> list[int]:
        return torch.randint(vocab, (size,), generator=made).tolist()

    # Rewards of two kinds, or no sequence would have a gradient.
    batch = TrainingBatch(
        prompt_ids=[tokens(prompt)] * count,
        completion_ids=[tokens(length) for _ in range(count)],
        logprobs=[[-math.log(vocab)] * length for _ in range(count)],
        rewards=[float(number % 2) for number in range(count)],
        group_size=count,
    )
    seconds = []
    for _ in range(1 + settings["updates"]):
        began = now()
        learner.update(batch)
        seconds.append(now() - began)
    best = min(seconds[1:])
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "tokens_per_second": count * (prompt + length) / best,
        "torch_peak_gib": peak_gib(),
    }


def ratios(kinds: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times faster the sparse policy is, and how many times less memory it takes, by response length."""
    table: dict[str, dict[str, float]] = {}
    for part in PARTS:
        full, nsa = (kinds.get(kind, {}).get(part, {}) for kind in KINDS)
        for length in full.keys() & nsa.keys():
            if "failed" in full[length] or "failed" in nsa[length]:
                continue
            row = table.setdefault(length, {})
            row[part] = nsa[length]["tokens_per_second"] / full[length]["tokens_per_second"]
            if full[length]["torch_peak_gib"]:
                row[f"{part}_memory"] = full[length]["torch_peak_gib"] / nsa[length]["torch_peak_gib"]
    return dict(sorted(table.items(), key=lambda entry: int(entry[0])))


def measured(record: dict[str, Any], part: str) -> list[tuple[str, dict[str, Any]]]:
    return [(length, row) for length, row in record.get(part, {}).items() if "failed" not in row]


def shown(kind: str, record: dict[str, Any]) -> Iterator[str]:
    yield f"{kind} (process {record['process_seconds']:.0f} s)"
    yield from failure(record)
    for part in PARTS:
        for length, row in record.get(part, {}).items():
            if "failed" in row:
                yield f"  {part} of {length} FAILED: {row['failed']}"
    for length, row in measured(record, "rollout"):
        times = ", ".join(f"{context}: {seconds * 1e3:.2f}" for context, seconds in row["seconds_a_token"].items())
        yield (
            f"  rollout of {length}: {row['tokens_per_second']:,.0f} tokens/s, peak {row['torch_peak_gib']:.1f} GiB "
            f"(ms a token of all sequences at context {times})"
        )
    for length, row in measured(record, "update"):
        times = ", ".join(f"{seconds:.2f}" for seconds in row["seconds"])
        speed, peak = row["tokens_per_second"], row["torch_peak_gib"]
        yield f"  update on {length}: {speed:,.0f} tokens/s, peak {peak:.1f} GiB ({times} s)"


if __name__ == "__main__":
    sys.exit(main())
