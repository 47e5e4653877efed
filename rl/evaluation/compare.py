"""Two evaluations of the same problems: paired differences with intervals, and the problems that changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rl.evaluation.manifest import MANIFEST, Manifest, read_manifest
from plumbline.rl.evaluation.scores import Evaluation, Row, by_problem, summarise
from plumbline.rl.files import read_rows
from plumbline.rl.stats import Interval, paired_difference

SHOWN = 10


@dataclass(frozen=True)
class Change:
    """A problem whose share of right completions differs."""

    sample_id: str
    a: float
    b: float
    problem: str


@dataclass(frozen=True)
class Comparison:
    """One benchmark in both evaluations.

    Attributes:
        name: benchmark.
        n: problems in both.
        only_a, only_b: problems in one alone, left out.
        a, b: their accuracies over the n problems.
        difference: b - a, paired, 95% bootstrap interval over problems.
        changed: problems that differ, the largest difference first.
    """

    name: str
    n: int
    only_a: int
    only_b: int
    a: Evaluation
    b: Evaluation
    difference: Interval
    changed: list[Change]

    @property
    def better(self) -> int:
        return sum(change.b > change.a for change in self.changed)

    @property
    def worse(self) -> int:
        return len(self.changed) - self.better

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "problems": self.n,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "a": self.a.accuracy.as_dict(),
            "b": self.b.accuracy.as_dict(),
            "difference": self.difference.as_dict(),
            "better": self.better,
            "worse": self.worse,
            "changed": [
                {"sample_id": change.sample_id, "a": change.a, "b": change.b, "problem": change.problem}
                for change in self.changed
            ],
        }


def load_evaluation(folder: Path) -> tuple[Manifest, dict[str, list[Row]]]:
    """Manifest and completions of each finished benchmark. InputError when the folder is no evaluation, or unfinished."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not the folder of an evaluation: it has no {MANIFEST}")
    manifest = read_manifest(folder)
    rows = {
        part.name: read_rows(folder / f"{part.name}.jsonl")
        for part in manifest.benchmarks
        if (folder / f"{part.name}.jsonl").is_file()
    }
    if not rows:
        raise InputError(f"{folder} holds no finished benchmark; go on with plumbline evaluate --resume")
    return manifest, rows


def compare_benchmark(name: str, rows_a: list[Row], rows_b: list[Row]) -> Comparison:
    """Pair two lists of completions by problem.

    Raises InputError when they have no problem in common, or one problem with two golds.
    """
    problems_a, problems_b = by_problem(rows_a), by_problem(rows_b)
    common = [sample_id for sample_id in problems_a if sample_id in problems_b]
    if not common:
        raise InputError(f"{name}: the two evaluations have no problem in common")
    for sample_id in common:
        golds = problems_a[sample_id][0]["gold"], problems_b[sample_id][0]["gold"]
        if golds[0] != golds[1]:
            raise InputError(
                f"{name}: problem {sample_id} has gold {golds[0]!r} in A and {golds[1]!r} in B; evaluate on the same data"
            )
    a = summarise(name, [row for sample_id in common for row in problems_a[sample_id]], 0.0)
    b = summarise(name, [row for sample_id in common for row in problems_b[sample_id]], 0.0)
    changed = [
        Change(sample_id, a.per_problem[sample_id], b.per_problem[sample_id], problems_a[sample_id][0]["problem"])
        for sample_id in common
        if a.per_problem[sample_id] != b.per_problem[sample_id]
    ]
    changed.sort(key=lambda change: (-abs(change.b - change.a), change.sample_id))
    values = [np.array([e.per_problem[sample_id] for sample_id in common]) for e in (a, b)]
    return Comparison(
        name,
        len(common),
        len(problems_a) - len(common),
        len(problems_b) - len(common),
        a,
        b,
        paired_difference(*values),
        changed,
    )


def compare(folder_a: Path, folder_b: Path) -> list[Comparison]:
    """Every benchmark that both folders hold. InputError when there is none."""
    (_, a), (_, b) = load_evaluation(folder_a), load_evaluation(folder_b)
    names = [name for name in a if name in b]
    if not names:
        raise InputError(f"no benchmark in common: {folder_a} has {', '.join(a)}; {folder_b} has {', '.join(b)}")
    return [compare_benchmark(name, a[name], b[name]) for name in names]


def print_comparison(comparisons: list[Comparison], label_a: str, label_b: str, console: Console) -> None:
    """A table of all benchmarks, then the problems that changed most."""
    table = Table(title=f"B = {label_b} against A = {label_a}, paired by problem, 95% intervals", title_justify="left")
    for heading in ("benchmark", "problems", "A", "B", "B - A (points)", "95% interval", "better", "worse"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for found in comparisons:
        d = found.difference
        table.add_row(
            found.name,
            str(found.n),
            f"{found.a.accuracy.mean:.1%}",
            f"{found.b.accuracy.mean:.1%}",
            f"{100 * d.mean:+.1f}",
            f"{100 * d.low:+.1f} to {100 * d.high:+.1f}",
            str(found.better),
            str(found.worse),
        )
    console.print(table)
    for found in comparisons:
        if found.only_a or found.only_b:
            console.print(f"{found.name}: left out {found.only_a} problems only in A, {found.only_b} only in B")
        for change in found.changed[:SHOWN]:
            text = " ".join(change.problem.split())
            console.print(
                f"{found.name} {change.sample_id}: {change.a:.0%} -> {change.b:.0%}  {text[:70]}",
                highlight=False,
                markup=False,
            )
        if len(found.changed) > SHOWN:
            console.print(f"{found.name}: … and {len(found.changed) - SHOWN} more")


def write_comparison(comparisons: list[Comparison], path: Path) -> None:
    path.write_text(json.dumps([found.as_dict() for found in comparisons], indent=1) + "\n", encoding="utf-8")
