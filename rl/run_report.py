"""One page for a run, or for several side by side: training curves, evaluations, settings, all from the runs' folders."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml

from plumbline.errors import InputError
from plumbline.rl.evaluation.compare import compare_benchmark
from plumbline.rl.evaluation.scores import Evaluation, Row, summarise
from plumbline.rl.files import read_rows
from plumbline.rl.output import MARKER
from plumbline.rl.stats import Interval
from plumbline.rl.telemetry import read_metrics
from plumbline.rl.trackers import flat
from plumbline.selection.figures import FONT, label_axes, new_figure
from plumbline.selection.report import Section, render_html

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Column of metrics.jsonl -> (section, label of the axis). Only what a run has is drawn.
CURVES: dict[str, tuple[str, str]] = {
    "reward/mean": ("Reward", "mean reward"),
    "reward/correct": ("Reward", "completions graded correct (share)"),
    "reward/groups_without_signal": ("Reward", "groups whose rewards are all the same (share)"),
    "rollout/completion_tokens": ("Completions", "mean completion length (tokens)"),
    "rollout/truncated": ("Completions", "completions cut at the limit (share)"),
    "learner/entropy": ("Policy", "entropy (nats a token)"),
    "learner/kl_reference": ("Policy", "KL to the starting policy (nats a token)"),
    "learner/approx_kl": ("Policy", "KL to the rollout policy (nats a token)"),
    "learner/ratio_max": ("Policy", "largest importance ratio"),
    "learner/clip_fraction_high": ("Policy", "tokens clipped at the ceiling (share)"),
    "learner/clip_fraction_low": ("Policy", "tokens clipped at the floor (share)"),
    "learner/gradient_norm": ("Policy", "gradient norm before clipping"),
    "rollout/tokens_per_second": ("Speed", "rollout and grading (tokens a second)"),
    "time/step_seconds": ("Speed", "step (seconds)"),
    "grader/timeout": ("Grader", "gradings killed at the time limit (share)"),
    "grader/error": ("Grader", "gradings that failed (share)"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222", "#999999")
# As much of a label as stands beside a figure in one line.
LABEL_CHARACTERS = 28
# Of two compared runs: so many changed problems, and so much of each.
CHANGED_SHOWN, CHANGED_CHARACTERS = 20, 60
# Figures whose values are all zero say nothing; one sentence says it instead.
QUIET_WHEN_ZERO = (
    "rollout/truncated",
    "grader/timeout",
    "grader/error",
    "learner/clip_fraction_high",
    "learner/clip_fraction_low",
)


@dataclass
class Run:
    """What a folder holds.

    Attributes:
        label: how the page calls it, unique on the page.
        marker: run.json.
        settings: config.yaml, dotted.
        curves: label -> rows of metrics.jsonl; a pipeline has one a stage.
        answers: benchmark -> completions.
        seconds: benchmark -> wall time.
    """

    folder: Path
    label: str
    marker: dict[str, Any]
    settings: dict[str, str]
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    answers: dict[str, list[Row]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)


def read_run(folder: Path, label: str) -> Run:
    """InputError when the folder is no run of plumbline's."""
    marker, config = folder / MARKER, folder / "config.yaml"
    if not marker.is_file() or not config.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no {MARKER} and config.yaml")
    run = Run(
        folder,
        label,
        json.loads(marker.read_text(encoding="utf-8")),
        {name: str(value) for name, value in flat(yaml.safe_load(config.read_text(encoding="utf-8")))},
    )
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))]:
        rows = read_metrics(path.parent)
        if rows:
            run.curves[label if path.parent == folder else f"{label}: {path.parent.name}"] = rows
    for place in (folder, folder / "evaluation"):
        for figures in sorted(place.glob("*.json")):
            rows_path = figures.with_suffix(".jsonl")
            if rows_path.is_file():
                tree = json.loads(figures.read_text(encoding="utf-8"))
                run.answers[figures.stem] = read_rows(rows_path)
                run.seconds[figures.stem] = tree["seconds"]
                run.evaluations[figures.stem] = summarise(figures.stem, run.answers[figures.stem], tree["seconds"])
    return run


def write_run_report(folders: list[Path], path: Path) -> None:
    """The page of one run, or of several with the same sections. InputError for a folder that is no run."""
    labels = _labels(folders)
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    title = f"plumbline {runs[0].marker['kind']}: {labels[0]}" if len(runs) == 1 else f"plumbline: {', '.join(labels)}"
    sections = [overview(runs), *evaluation_sections(runs), *curve_sections(runs), settings_section(runs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(title, sections), encoding="utf-8")


def overview(runs: list[Run]) -> Section:
    rows = [["run", "kind", "started", "steps", "policy", "folder"]]
    for run in runs:
        steps = [str(int(rows_[-1]["step"])) for rows_ in run.curves.values()]
        rows.append(
            [
                run.label,
                run.marker["kind"],
                run.marker["started"],
                ", ".join(steps) or "-",
                run.settings["policy.path"],
                str(run.folder),
            ]
        )
    versions = "; ".join(
        f"{run.label}: " + ", ".join(f"{name} {version}" for name, version in run.marker["versions"].items())
        for run in runs
    )
    return {"title": "Runs" if len(runs) > 1 else "Run", "table": rows, "note": versions}


def settings_section(runs: list[Run]) -> Section:
    """All settings of one run; of several, those that differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    if len(runs) > 1:
        keys = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    rows = [["setting", *(run.label for run in runs)]]
    rows += [[key, *(run.settings.get(key, "-") for run in runs)] for key in keys]
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    return {"title": title, "table": rows} if keys else {"title": title, "text": "None."}


def curve_sections(runs: list[Run]) -> list[Section]:
    """One section for each group of CURVES that any run has, all runs in each figure."""
    curves = {name: rows for run in runs for name, rows in run.curves.items()}
    sections: dict[str, Section] = {}
    for key, (title, label) in CURVES.items():
        having = {name: rows for name, rows in curves.items() if any(key in row for row in rows)}
        if not having:
            continue
        section = sections.setdefault(title, {"title": title, "figures": [], "text": []})
        if key in QUIET_WHEN_ZERO and all(row.get(key, 0) == 0 for rows in having.values() for row in rows):
            section["text"].append(f"{label[0].upper()}{label[1:]}: 0 in every step.")  # type: ignore[union-attr]
            continue
        section["figures"].append(curve_figure(having, key, label))
    return list(sections.values())


def curve_figure(curves: dict[str, list[dict[str, float]]], key: str, label: str) -> Figure:
    """One metric of every run against the step."""
    figure, axes = new_figure(height=3.4)
    for colour, (name, rows) in zip(_colours(len(curves)), curves.items(), strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        mark = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.5, color=colour, marker=mark, markersize=4)
    label_axes(axes, "training step", textwrap.fill(label, LABEL_CHARACTERS))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(curves), 2), fontsize=FONT - 1, frameon=False)
    return figure


def evaluation_sections(runs: list[Run]) -> list[Section]:
    """Accuracies with intervals, paired differences to the first run, levels, subjects and lengths."""
    measured = [(run, name, found) for run in runs for name, found in run.evaluations.items()]
    if not measured:
        return []
    sections: list[Section] = [
        {
            "title": "Evaluation",
            "text": "Means over problems with 95% intervals over problems; k completions of each problem.",
            "table": _evaluation_rows(measured),
            "figures": [accuracy_figure(runs)],
        },
        {
            "title": "Cut, unanswered, ungraded",
            "text": "Shares of completions that reached the limit, have no complete box, or could not be graded; 95% intervals.",
            "table": _outcome_rows(measured),
        },
    ]
    paired = _paired_rows(runs)
    if len(paired) > 1:
        sections.append(
            {
                "title": "Paired differences",
                "text": f"Against {runs[0].label}, over the problems both answered; 95% bootstrap intervals over problems.",
                "table": paired,
            }
        )
    if len(runs) == 2:
        sections += changed_sections(*runs)
    for title, parts in (("Levels", "by_level"), ("Subjects", "by_subject")):
        rows = [["benchmark", title.lower()[:-1], "problems", *(run.label for run in runs)]]
        for name in dict.fromkeys(name for _, name, _ in measured):
            values = dict.fromkeys(v for _, other, found in measured if other == name for v in getattr(found, parts))
            for value in values:
                cells = [_part(run.evaluations.get(name), parts, value) for run in runs]
                n = next(c.n for c in cells if c is not None)
                rows.append([name, value, str(n), *("-" if c is None else _percent(c) for c in cells)])
        if len(rows) > 1:
            sections.append({"title": title, "table": rows})
    lengths = [found for _, _, found in measured if found.tokens]
    if lengths:
        sections.append(
            {"title": "Completion lengths", "table": _length_rows(measured), "figures": length_figures(runs)}
        )
    return sections


def changed_sections(first: Run, second: Run) -> list[Section]:
    """The problems whose share of right completions differs most, for two runs that answered the same benchmark."""
    sections: list[Section] = []
    for name in first.answers:
        if name not in second.answers:
            continue
        changed = compare_benchmark(name, first.answers[name], second.answers[name]).changed
        rows = [["problem", first.label, second.label, "text"]]
        for change in changed[:CHANGED_SHOWN]:
            text = textwrap.shorten(change.problem, CHANGED_CHARACTERS, placeholder=" …")
            rows.append([change.sample_id, f"{change.a:.0%}", f"{change.b:.0%}", text])
        if changed:
            note = f"{min(len(changed), CHANGED_SHOWN)} of {len(changed)} problems that changed, the largest changes first."
            sections.append({"title": f"Changed problems: {name}", "table": rows, "note": note})
    return sections


def accuracy_figure(runs: list[Run]) -> Figure:
    """avg@k of every run on every benchmark, with intervals."""
    runs = [run for run in runs if run.evaluations]
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    figure, axes = new_figure(width=max(6.2, 1.1 * len(names)), height=3.6)
    width = 0.8 / len(runs)
    for place, (run, colour) in enumerate(zip(runs, _colours(len(runs)), strict=True)):
        known = [(at, run.evaluations[name].accuracy) for at, name in enumerate(names) if name in run.evaluations]
        at = np.array([at for at, _ in known]) + (place - (len(runs) - 1) / 2) * width
        means = np.array([100 * value.mean for _, value in known])
        spread = np.array([[100 * (v.mean - v.low) for _, v in known], [100 * (v.high - v.mean) for _, v in known]])
        axes.bar(at, means, width * 0.92, yerr=spread, capsize=4, color=colour, label=run.label)
    counts = {name: {run.evaluations[name].accuracy.n for run in runs if name in run.evaluations} for name in names}
    ticks = [f"{name}\n(n = {', '.join(map(str, sorted(counts[name])))})" for name in names]
    axes.set_xticks(range(len(names)), ticks, rotation=25 if len(names) > 5 else 0)
    axes.set_ylim(0, 100)
    label_axes(
        axes,
        f"{_kind([(run, *item) for run in runs for item in run.evaluations.items()])} (problems)",
        "avg@k (%), 95% interval",
    )
    if len(runs) > 1:
        figure.legend(loc="outside upper center", ncols=min(len(runs), 3), fontsize=FONT - 1, frameon=False)
    return figure


def length_figures(runs: list[Run]) -> list[Figure]:
    """How long right and wrong completions are, one figure a benchmark and run."""
    figures = []
    for run in runs:
        for name, rows in run.answers.items():
            known = [row for row in rows if row["tokens"] is not None]
            if not known:
                continue
            figure, axes = new_figure(height=3.0)
            edges = np.linspace(0, max(row["tokens"] for row in known) or 1, 31).tolist()
            parts = [[row["tokens"] for row in known if row["correct"] is right] for right in (True, False)]
            labels = [f"right ({len(parts[0]):,})", f"wrong ({len(parts[1]):,})"]
            axes.hist(parts, edges, stacked=True, color=["#0072b2", "#d55e00"], label=labels)
            axes.set_title(name if len(runs) == 1 else f"{run.label}: {name}", fontsize=FONT)
            label_axes(axes, "completion length (tokens)", "completions")
            axes.legend(fontsize=FONT - 1, frameon=False)
            figures.append(figure)
    return figures


def _evaluation_rows(measured: list[tuple[Run, str, Evaluation]]) -> list[list[str]]:
    rows = [["run", _kind(measured), "problems", "k", "avg@k", "pass@k", "maj@k"]]
    for run, name, found in measured:
        passed = _percent(found.pass_at[found.completions]) if found.completions > 1 else "-"
        voted = _percent(found.majority) if found.majority else "-"
        counts = [str(found.accuracy.n), str(found.completions)]
        rows.append([run.label, name, *counts, _percent(found.accuracy), passed, voted])
    return rows


def _outcome_rows(measured: list[tuple[Run, str, Evaluation]]) -> list[list[str]]:
    """Apart from the accuracies, or the table is wider than a page."""
    rows = [["run", _kind(measured), "truncated", "no answer", "ungraded", "seconds"]]
    for run, name, found in measured:
        shares = [_percent(share) for share in (found.truncated, found.no_answer, found.grader_faults)]
        rows.append([run.label, name, *shares, f"{found.seconds:.0f}"])
    return rows


def _kind(measured: list[tuple[Run, str, Evaluation]]) -> str:
    """What the evaluations of these runs are called: a pipeline's are those of its arms, on one benchmark."""
    return "arm" if all(run.marker["kind"] == "run" for run, *_ in measured) else "benchmark"


def _length_rows(measured: list[tuple[Run, str, Evaluation]]) -> list[list[str]]:
    columns = ("mean", "median", "p95", "max", "mean_right", "mean_wrong")
    rows = [["run", _kind(measured), *(f"{column.replace('_', ', ')}" for column in columns)]]
    for run, name, found in measured:
        if found.tokens:
            rows.append([run.label, name, *(f"{found.tokens[c]:,.0f}" if c in found.tokens else "-" for c in columns)])
    return rows


def _paired_rows(runs: list[Run]) -> list[list[str]]:
    rows = [["run", "benchmark", "problems", "difference (points)", "95% interval", "better", "worse"]]
    first = runs[0]
    for run in runs[1:]:
        for name in first.answers:
            if name in run.answers:
                found = compare_benchmark(name, first.answers[name], run.answers[name])
                d = found.difference
                interval = f"{100 * d.low:+.1f} to {100 * d.high:+.1f}"
                rows.append(
                    [
                        run.label,
                        name,
                        str(found.n),
                        f"{100 * d.mean:+.1f}",
                        interval,
                        str(found.better),
                        str(found.worse),
                    ]
                )
    return rows


def _part(found: Evaluation | None, parts: str, value: str) -> Interval | None:
    return None if found is None else getattr(found, parts).get(value)


def _percent(value: Interval) -> str:
    return f"{value.mean:.1%} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _labels(folders: list[Path]) -> list[str]:
    """Folder names; with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise InputError(f"the same run twice: {', '.join(map(str, folders))}")
