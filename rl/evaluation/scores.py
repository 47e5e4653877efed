"""What graded completions come to: avg@k, pass@k, maj@k, lengths and rates, each with its interval over problems.

Everything here is a function of the stored rows (one a completion), so a finished evaluation can be summed up again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plumbline.rewards.workers import Grader
from plumbline.rl.stats import Interval, mean_interval

Row = dict[str, Any]


@dataclass
class Evaluation:
    """One benchmark's figures.

    Attributes:
        name: the benchmark.
        completions: of each problem.
        accuracy: avg@k, the mean over problems of the share of right completions.
        pass_at: k -> pass@k for powers of two up to `completions`, by the unbiased estimator.
        majority: maj@k over all completions of a problem; None for one completion.
        by_level, by_subject: accuracy of each, where problems carry one.
        truncated, no_answer, grader_faults: shares of completions (the last: timeout, error or bad gold).
        tokens: completion length: mean, median, p95, max, and the means of right and of wrong completions; empty where
            the engine does not tell lengths.
        per_problem: sample id -> share of right completions.
        seconds: wall time.
        settings: how it was sampled.
    """

    name: str
    completions: int
    accuracy: Interval
    pass_at: dict[int, Interval]
    majority: Interval | None
    by_level: dict[str, Interval]
    by_subject: dict[str, Interval]
    truncated: Interval
    no_answer: Interval
    grader_faults: Interval
    tokens: dict[str, float]
    per_problem: dict[str, float]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "completions_per_problem": self.completions,
            "accuracy": self.accuracy.as_dict(),
            "pass_at": {str(k): interval.as_dict() for k, interval in self.pass_at.items()},
            "majority": self.majority.as_dict() if self.majority else None,
            "by_level": {level: interval.as_dict() for level, interval in self.by_level.items()},
            "by_subject": {subject: interval.as_dict() for subject, interval in self.by_subject.items()},
            "truncated": self.truncated.as_dict(),
            "no_answer": self.no_answer.as_dict(),
            "grader_faults": self.grader_faults.as_dict(),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "settings": self.settings,
            "per_problem": self.per_problem,
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k completions is right, estimated from c right ones among n (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), as a product that never overflows. Unbiased for k <= n; ValueError beyond.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n = {n}, c = {c}, k = {k}")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def votes(answers: Sequence[str | None], correct: Sequence[bool], grader: Grader) -> list[int | None]:
    """Which completions of one problem gave the same answer.

    Right answers all equal the gold, so they are one candidate; wrong ones are compared with each other by the
    verifier's equivalence, in killable processes. A pair whose comparison fails counts as different.

    Args:
        answers: judged answers, None for none.
        correct: their verdicts.
        grader: compares.

    Returns:
        A candidate's number for each completion, in order of first appearance; None where there is no answer.
    """
    candidates: list[tuple[bool, str]] = []
    found: list[int | None] = []
    for answer, right in zip(answers, correct, strict=True):
        if answer is None:
            found.append(None)
            continue
        number = next(
            (i for i, (known, text) in enumerate(candidates) if known == right and (right or text == answer)), None
        )
        if number is None and not right:
            rest = [i for i, (known, _) in enumerate(candidates) if not known]
            verdicts = grader.grade_many([(f"\\boxed{{{answer}}}", candidates[i][1]) for i in rest])
            number = next((i for i, verdict in zip(rest, verdicts, strict=True) if verdict.correct), None)
        if number is None:
            number = len(candidates)
            candidates.append((right, answer))
        found.append(number)
    return found


def majority_share(chosen: Sequence[int | None], correct: Sequence[bool]) -> float:
    """1 if the most frequent answer is right, 0 if not; a tie is the share of right ones among the tied answers.

    Completions without an answer do not vote; without any vote the problem is lost.
    """
    counts: dict[int, int] = {}
    right: dict[int, bool] = {}
    for number, verdict in zip(chosen, correct, strict=True):
        if number is not None:
            counts[number] = counts.get(number, 0) + 1
            right[number] = verdict
    if not counts:
        return 0.0
    top = max(counts.values())
    tied = [right[number] for number, count in counts.items() if count == top]
    return sum(tied) / len(tied)


def summarise(name: str, rows: Sequence[Row], seconds: float) -> Evaluation:
    """All figures of one benchmark.

    Args:
        name: of the benchmark.
        rows: one a completion, as run.completion_rows writes them; every problem equally often.
        seconds: wall time.

    Raises:
        ValueError: no rows, or problems with different numbers of completions.
    """
    problems = by_problem(rows)
    sizes = {len(group) for group in problems.values()}
    if len(sizes) != 1:
        raise ValueError(f"{name}: every problem needs the same number of completions, found {sorted(sizes) or 'none'}")
    n = sizes.pop()
    right = {sample_id: sum(row["correct"] for row in group) for sample_id, group in problems.items()}
    per_problem = {sample_id: count / n for sample_id, count in right.items()}

    def over(measure: Callable[[list[Row]], float]) -> Interval:
        return mean_interval(np.array([measure(group) for group in problems.values()]))

    def share(test: Callable[[Row], bool]) -> Interval:
        return over(lambda group: sum(map(test, group)) / n)

    sizes_of_k = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return Evaluation(
        name=name,
        completions=n,
        accuracy=mean_interval(np.array(list(per_problem.values()))),
        pass_at={
            k: mean_interval(np.array([pass_at_k(n, count, k) for count in right.values()]))
            for k in dict.fromkeys([*sizes_of_k, n])
        },
        majority=over(lambda group: majority_share([row["vote"] for row in group], [row["correct"] for row in group]))
        if n > 1
        else None,
        by_level=_split(problems, per_problem, "level"),
        by_subject=_split(problems, per_problem, "subject"),
        truncated=share(lambda row: row["truncated"]),
        no_answer=share(lambda row: row["reason"] == "no_answer"),
        grader_faults=share(lambda row: row["reason"] in ("timeout", "error", "bad_gold")),
        tokens=_lengths(rows),
        per_problem=per_problem,
        seconds=seconds,
    )


def by_problem(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each sample id, in the order they come."""
    problems: dict[str, list[Row]] = {}
    for row in rows:
        problems.setdefault(row["sample_id"], []).append(row)
    return problems


def _split(problems: dict[str, list[Row]], per_problem: dict[str, float], column: str) -> dict[str, Interval]:
    parts: dict[str, list[float]] = {}
    for sample_id, group in problems.items():
        value = group[0].get(column)
        if value is not None:
            parts.setdefault(str(value), []).append(per_problem[sample_id])
    return {value: mean_interval(np.array(parts[value])) for value in sorted(parts)}


def _lengths(rows: Sequence[Row]) -> dict[str, float]:
    known = [(row["tokens"], row["correct"]) for row in rows if row["tokens"] is not None]
    if not known:
        return {}
    lengths = np.array([tokens for tokens, _ in known], dtype=np.float64)
    right = np.array([correct for _, correct in known], dtype=bool)
    found = {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p95": float(np.quantile(lengths, 0.95)),
        "max": float(lengths.max()),
    }
    if right.any():
        found["mean_right"] = float(lengths[right].mean())
    if not right.all():
        found["mean_wrong"] = float(lengths[~right].mean())
    return found
