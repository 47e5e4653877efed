"""Speed of the verifier against math-verify, in one process and one run: `python benchmarks/verifier.py [DATA]`.

Two workloads: golds of LIMR boxed (the typical answer), and the hard pairs of tests/rewards/labelled that need a parser. DATA is
the folder with limr/full.jsonl. Prints the medians and writes benchmarks/results/verifier.json with versions and sample sizes.
"""  # noqa: E501

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
Pair = tuple[str, str]


def seconds(function: Callable[[str, str], object], pairs: list[Pair]) -> list[float]:
    """Seconds of each call, in order, after one call to warm up."""
    function(*pairs[0])
    out = []
    for answer, gold in pairs:
        began = time.perf_counter()
        function(answer, gold)
        out.append(time.perf_counter() - began)
    return out


def summary(times: list[float]) -> dict[str, float]:
    """Median with its 95% bootstrap interval, and the 95th percentile, in microseconds."""
    random = Random(0)
    medians = sorted(statistics.median(random.choices(times, k=len(times))) for _ in range(200))
    return {
        "n": len(times),
        "median_us": statistics.median(times) * 1e6,
        "median_low_us": medians[5] * 1e6,
        "median_high_us": medians[194] * 1e6,
        "p95_us": sorted(times)[int(0.95 * len(times))] * 1e6,
    }


def main() -> None:
    from math_verify import parse, verify

    from plumbline.rewards.verifier import grade

    logging.disable(logging.CRITICAL)
    data = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PLUMBLINE_DATA", ROOT.parent / "shared" / "data"))
    with (data / "limr" / "full.jsonl").open(encoding="utf-8") as lines:
        golds = [json.loads(line)["answer"] for line in lines]
    golds = [gold for gold in golds if gold.strip()]
    hard: list[Pair] = []
    for file in sorted((ROOT / "tests" / "rewards" / "labelled").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        hard += [(row["answer"], row["gold"]) for row in rows]

    def ours(answer: str, gold: str) -> object:
        return grade(f"So the answer is $\\boxed{{{answer}}}$.", gold)

    def theirs(answer: str, gold: str) -> object:
        reference = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        return verify(
            reference, parse(f"So the answer is $\\boxed{{{answer}}}$.", parsing_timeout=None), timeout_seconds=None
        )

    sample = Random(0).sample(golds, min(1000, len(golds)))
    other = [("7" + gold, gold) for gold in sample]  # settled by parsing, not by looking the same
    result = {
        "limr_golds": {
            "plumbline": summary(seconds(ours, [(g, g) for g in golds])),
            "math_verify": summary(seconds(theirs, [(g, g) for g in sample])),
        },
        "limr_golds_wrong": {"plumbline": summary(seconds(ours, other))},
        "labelled_pairs": {"plumbline": summary(seconds(ours, hard))},
        "versions": {name: version(name) for name in ("plumbline-rl", "math-verify", "sympy", "mpmath")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    golds_result = result["limr_golds"]
    assert isinstance(golds_result, dict)
    result["ratio_of_medians"] = golds_result["math_verify"]["median_us"] / golds_result["plumbline"]["median_us"]
    print(json.dumps(result, indent=2))
    target = ROOT / "benchmarks" / "results" / "verifier.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
