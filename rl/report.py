"""The pipeline's report: one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from plumbline.rl.tasks import TaskSet
from plumbline.rl.telemetry import read_metrics
from plumbline.selection import figures
from plumbline.selection.report import Section, render_html

matplotlib.use("Agg")
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from plumbline.rl.pipeline import PipelineResult


def write_report(result: PipelineResult, full: TaskSet, path: Path) -> None:
    """Accuracy, the average learning curve with example curves, the scores, the training curves, the selected samples."""
    config, selected, chosen = result.config, result.selected, result.selected.chosen
    scored = selected.scored
    runs = {name: read_metrics(config.folder / name) for name in result.training}
    cost = result.training["prerun"].rollouts
    sections: list[Section] = [
        {
            "title": "Held-out accuracy",
            "text": (
                f"Each arm starts from the same policy and trains for {config.steps} steps at equal rollouts; the pre-run that "
                f"{chosen.method} selects from took {cost:,} rollouts more, which the other arms did not spend. One row a policy, n = {result.base.accuracy.n} held-out "
                f"problems, {config.evaluation.completions_per_problem} completion(s) each at temperature {config.evaluation.temperature:g}."
            ),
            "table": accuracy_rows(result),
            "figures": [accuracy_figure(result)],
        },
        {
            "title": "Learning trajectories",
            "text": (
                f"The mean reward of all samples at each epoch of the pre-run, with curves of the highest and the lowest {chosen.label}. "
                f"{scored:,} samples have a score, {len(chosen.sample_ids) - scored:,} do not."
            ),
            "figures": [
                figures.average_learning_curve(chosen.curves, chosen.sample_ids, chosen.scores, value=selected.value)
            ],
        },
        {
            "title": f"Selection by {chosen.method}",
            "text": selected.lines(),
            "note": "selection/report.html has the rest: grader health, overlap with other methods, the samples.",
            "figures": [figures.score_histogram(chosen.scores, chosen.low, name=chosen.label)],
            "table": level_rows(result, full),
        },
        {
            "title": "Training",
            "text": "Every step of the pre-run and of the arms.",
            "figures": [
                training_figure(runs, "reward/correct", "share of completions graded correct"),
                training_figure(runs, "rollout/completion_tokens", "mean completion length (tokens)"),
                training_figure(runs, "learner/entropy", "policy entropy (nats a token)"),
            ],
        },
    ]
    path.write_text(render_html(f"plumbline run: {config.name}", sections), encoding="utf-8")


def accuracy_rows(result: PipelineResult) -> list[list[str]]:
    """Heading row first."""
    rows = [["policy", "samples", "rollouts", "with pre-run", "accuracy", "95% interval"]]
    base = result.base.accuracy
    rows.append(["base", "-", "-", "-", f"{base.mean:.1%}", f"{base.low:.1%} to {base.high:.1%}"])
    for arm, evaluation in result.arms.items():
        accuracy, spent = evaluation.accuracy, result.training[arm].rollouts
        total = spent + (result.training["prerun"].rollouts if arm not in ("full", "random") else 0)
        rows.append(
            [
                arm,
                f"{result.samples[arm]:,}",
                f"{spent:,}",
                f"{total:,}",
                f"{accuracy.mean:.1%}",
                f"{accuracy.low:.1%} to {accuracy.high:.1%}",
            ]
        )
    return rows


def level_rows(result: PipelineResult, full: TaskSet) -> list[list[str]]:
    """Kept and scored samples of each level, where the data has levels."""
    kept = set(result.selected.kept)
    counts: dict[str, list[int]] = {}
    for sample_id in result.selected.chosen.sample_ids:
        level = str(full[sample_id].problem.extras.get("level", "none"))
        entry = counts.setdefault(level, [0, 0])
        entry[0] += sample_id in kept
        entry[1] += 1
    rows = [["level", "kept", "scored", "share kept"]]
    return rows + [[level, str(a), str(b), f"{a / b:.0%}"] for level, (a, b) in sorted(counts.items())]


def accuracy_figure(result: PipelineResult) -> Figure:
    names = ["base", *result.arms]
    values = [result.base.accuracy, *[evaluation.accuracy for evaluation in result.arms.values()]]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    means = np.array([100 * value.mean for value in values])
    spread = np.array([[100 * (v.mean - v.low) for v in values], [100 * (v.high - v.mean) for v in values]])
    axes.bar(names, means, yerr=spread, capsize=5, color=["#8a8f98", "#4c78a8", "#9ecae9", "#e4572e"][: len(names)])
    axes.set_ylabel("held-out problems correct (%)")
    axes.set_ylim(0, 100)
    axes.set_title("Accuracy with 95% intervals")
    return figure


def training_figure(runs: dict[str, list[dict[str, float]]], metric: str, label: str) -> Figure:
    """One metric of every run against the step."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, rows in runs.items():
        axes.plot([row["step"] for row in rows], [row[metric] for row in rows], label=name, linewidth=1.4)
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
