"""plumbline select: from a reward history to the samples worth training on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from plumbline.rl.data import Problem
    from plumbline.selection.facts import Facts
    from plumbline.selection.methods import Selection

# Columns of each sample's problem.
Problems = dict[str, dict[str, Any]]


def select(
    method: Annotated[
        str, typer.Argument(help="lim, random, linear, pass_rate, variance, p(1-p) or guess.", show_default=False)
    ],
    history: Annotated[
        Path,
        typer.Option(help="A run's folder or its history, a TRL / verl / OpenRLHF log, or a CSV / Parquet of curves."),
    ],
    run: Annotated[list[str] | None, typer.Option(help="Run in the history; several are read as one.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="First so many epochs, to leave out one that was cut short.")
    ] = None,
    variant: Annotated[str, typer.Option(help="Of lim: limr (the published code) or paper.")] = "limr",
    threshold: Annotated[
        float | None, typer.Option(help="Keep scores from here on; default: the method's own.")
    ] = None,
    high: Annotated[float | None, typer.Option(help="And up to here.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Keep the so many highest scores instead.")] = None,
    share: Annotated[float | None, typer.Option(help="Keep this share of the samples instead.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="The training set, for problems, levels and sources (as data.source); default: what the run's config says."
        ),
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the sample id in an imported log.")] = None,
    reward: Annotated[str | None, typer.Option(help="Column of the reward in a TRL log with several.")] = None,
    correct_at: Annotated[float, typer.Option(help="Rewards of an imported log from here on are correct.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of random, and of ties.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the subset and report; default runs/select-METHOD.")
    ] = None,
) -> None:
    """Score the samples of a recorded run and keep the ones worth training on."""
    from rich.console import Console

    from plumbline.errors import InputError
    from plumbline.selection import lim
    from plumbline.selection.curves import VALUES
    from plumbline.selection.methods import arm_name, curve_value, method_named, select_samples
    from plumbline.selection.report import render_html, render_markdown
    from plumbline.selection.selection_report import sections
    from plumbline.selection.subset import nothing_kept, write_subset

    console = Console(highlight=False)
    folder = output or Path("runs") / f"select-{arm_name(method)}"
    try:
        method_named(method)
        if variant not in lim.VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; there are {', '.join(lim.VARIANTS)}")
        value = curve_value(method, variant)
        imported = {"id_column": id_column, "correct_at": correct_at, "reward": reward}
        ids, curves, facts, source = _read(history, folder, run, value, epochs, imported)
        chosen = select_samples(
            method, ids, curves, threshold=threshold, high=high, count=count, share=share, seed=seed,
            variant="paper" if variant == "paper" else "limr",
        )  # fmt: skip
        if not chosen.kept.any():
            raise ValueError(nothing_kept(chosen))
        problems = _problems(data, chosen) if data is not None else _problems_of_run(history, chosen, console)
        parts = sections(chosen, value=VALUES[value], source=source, facts=facts, problems=problems, seed=seed)
        paths = write_subset(chosen, folder, problems)
        title = f"plumbline select: {method}"
        (folder / "report.html").write_text(render_html(title, parts), encoding="utf-8")
        (folder / "report.md").write_text(render_markdown(title, parts, folder / "figures"), encoding="utf-8")
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"output folder {folder} cannot be written: {error}") from None
    _print(console, chosen, facts, problems, source)
    for path in [*paths, folder / "report.html", folder / "report.md"]:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    console.print(f"next: plumbline train CONFIG data.subset={paths[0]}", markup=False, soft_wrap=True)


def _read(
    history: Path, folder: Path, run: list[str] | None, value: str, epochs: int | None, imported: dict[str, Any]
) -> tuple[list[str], Any, Facts | None, str]:
    """(sample ids, curves, facts, where from in words) of whatever `history` is."""
    import shutil

    from plumbline.selection import importers
    from plumbline.selection.curves import curves
    from plumbline.selection.facts import sample_facts

    if not history.exists():
        raise FileNotFoundError(f"history {history} does not exist")
    kind = importers.detect(history)
    if kind is None:
        inside = sorted({path.parents[2] for path in history.glob("*/history/*/*.arrows")})
        if inside:
            raise ValueError(f"{history} holds {len(inside)} runs: name one of {', '.join(map(str, inside))}")
        raise ValueError(
            f"{history} is no reward history: expected a run's folder, a history, TRL's completions_*.parquet, "
            "verl's N.jsonl, OpenRLHF's step_N.json, or a .csv / .parquet of curves"
        )
    if kind == "curves":
        ids, table = importers.read_curves_table(history, value)
        return ids, table if epochs is None else table[:, :epochs], None, f"the table {history}"
    where = history
    if kind == "plumbline":
        where = history / "history" if any(history.glob("history/*/*.arrows")) else history
    else:
        where = folder / "history"
        if (where / kind).exists():
            raise ValueError(
                f"{where / kind} holds an earlier import; give another --output, or --history {where} to use it"
            )
        # Under another name until it is whole: what an import that failed or was killed left is no history.
        partial = folder / "history.partial"
        shutil.rmtree(partial, ignore_errors=True)
        common = {"id_column": imported["id_column"], "correct_at": imported["correct_at"]}
        if kind == "trl":
            importers.import_trl(history, partial, kind, reward=imported["reward"], **common)
        elif kind == "verl":
            importers.import_verl(history, partial, kind, **common)
        else:
            importers.import_openrlhf(history, partial, kind, **common)
        partial.rename(where)
    names = run or None
    ids, table = curves(where, value=value, run=names, epochs=epochs)
    facts = sample_facts(where, names)
    log = "" if kind == "plumbline" else f", a log of {kind}"
    return ids, table, facts, f"{facts.rows:,} graded completions in {history}{log}"


def _problems(data: str, chosen: Selection) -> Problems:
    """The training set by id, with every column."""
    from plumbline.rl.data import load_problems

    problems, _ = load_problems(data)
    found = _by_id(problems)
    if not any(sample_id in found for sample_id in chosen.sample_ids):
        raise ValueError(
            f"none of the {len(chosen.sample_ids):,} samples of the history is in {data}: ids there look like "
            f"{problems[0].id!r}, here like {chosen.sample_ids[0]!r}"
        )
    return found


def _problems_of_run(history: Path, chosen: Selection, console: Console) -> Problems | None:
    """The training set of the run that left this history; None if no run of ours did, or its data is not here now."""
    from plumbline.errors import InputError
    from plumbline.rl.config import load_config
    from plumbline.rl.output import MARKER
    from plumbline.rl.tasks import read_problems

    # A training run's folder, its history/, and the same of a pipeline's stage.
    nearby = (history, *history.resolve().parents[:2])
    folder = next((each for each in nearby if (each / MARKER).is_file() and (each / "config.yaml").is_file()), None)
    if folder is None:
        return None
    try:
        section = load_config(folder / "config.yaml").data
        found = _by_id(read_problems(section)[0])
        missing = sum(sample_id not in found for sample_id in chosen.sample_ids)
        if missing:
            raise InputError(f"{section.source} lacks {missing:,} of the {len(chosen.sample_ids):,} samples")
    except (InputError, FileNotFoundError) as error:
        console.print(f"without problems and levels, which --data would give: {error}", markup=False, soft_wrap=True)
        return None
    return found


def _by_id(problems: Sequence[Problem]) -> Problems:
    return {p.id: {"problem": p.problem, "answer": p.answer, **p.extras} for p in problems}


def _print(console: Console, chosen: Selection, facts: Facts | None, problems: Problems | None, source: str) -> None:
    """How many, why, from where, and whether the grader can be trusted."""
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from plumbline.selection.selection_report import group_columns, group_rows, health_rows, never_right_is_kept

    n, kept = len(chosen.sample_ids), int(chosen.kept.sum())
    console.print(f"{chosen.method} keeps {kept:,} of {n:,} samples ({kept / n:.1%}): {chosen.rule}", markup=False)
    console.print(
        f"curves of {chosen.curves.shape[1]} epochs from {source}; {int(chosen.incomplete.sum()):,} samples lack an "
        f"epoch, {int(np.isnan(chosen.scores).sum()):,} have no score",
        markup=False,
    )
    tables = [
        ("Kept by " + name, group_rows(groups, chosen.kept, name))
        for name, groups in group_columns(chosen, problems, facts).items()
    ]
    if facts is not None:
        tables.append(("Grader health", health_rows(facts, chosen)))
    for title, rows in tables:
        table = Table(title=title, title_justify="left")
        for place, heading in enumerate(rows[0]):
            table.add_column(heading, justify="left" if place == 0 else "right")
        for row in rows[1:]:
            table.add_row(*map(escape, row))
        console.print(table)
    if warning := never_right_is_kept(chosen):
        console.print(f"warning: {warning}", markup=False)
