"""plumbline scaling: loss-to-loss lines from tables of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def scaling(
    tables: Annotated[
        list[Path], typer.Argument(help="CSV, Parquet, JSONL, or folders of evaluations.", show_default=False)
    ],
    x: Annotated[str, typer.Option(help="Column of the loss to predict from.")],
    y: Annotated[str | None, typer.Option(help="Column of the loss to predict; default: the same column as x.")] = None,
    group: Annotated[str | None, typer.Option(help="Column that makes families, such as data.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Train-to-train: the group whose loss is x; the others give y.")
    ] = None,
    pair_on: Annotated[
        str | None, typer.Option(help="Train-to-train: comma list of columns that make two runs a pair.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="Column of parameter counts N, for the irreducible losses.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Column of training tokens D.")] = None,
    e_x: Annotated[float | None, typer.Option(help="Irreducible loss of x, if known.")] = None,
    e_y: Annotated[float | None, typer.Option(help="Irreducible loss of y, if known.")] = None,
    factors: Annotated[str | None, typer.Option(help="Comma list of columns: which of them moves the line?")] = None,
    predict: Annotated[list[Path] | None, typer.Option(help="Table of held-out runs to predict.")] = None,
    drop_incomplete: Annotated[
        bool, typer.Option("--drop-incomplete", help="Leave out rows with an empty or bad value.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=20, help="Bootstrap resamples of the intervals.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/scaling"),
) -> None:
    """Which data should the next run use? Fit L_y = K (L_x - E_x)^kappa + E_y, compare families, answer in words."""
    from rich.console import Console

    from plumbline.errors import InputError
    from plumbline.selection.loss_tables import drop_incomplete as complete
    from plumbline.selection.loss_tables import load_rows
    from plumbline.selection.report import render_html, render_markdown
    from plumbline.selection.scaling_analysis import Columns, compare, factor_effects, families, held_out
    from plumbline.selection.scaling_report import (
        Analysis,
        answer,
        comparison_rows,
        effect_rows,
        fit_rows,
        prediction_rows,
        sections,
    )

    console = Console()
    names = tuple(name.strip() for name in (pair_on or "").split(",") if name.strip())
    columns = Columns(x, y or x, group, params, tokens, reference, names)
    if y is None and reference is None:
        raise InputError("--y is missing: name the column to predict, or --reference for train-to-train")
    try:
        rows, dropped = load_rows(tables), 0
        held = load_rows(predict) if predict else []
        if drop_incomplete:
            needed = [name for name in (x, columns.y, params, tokens) if name]
            rows, dropped = complete(rows, needed)
            held = complete(held, [x, columns.y])[0] if held else held
        found, left_out = families(rows, columns, e_x=e_x, e_y=e_y, resamples=resamples, seed=seed)
        analysis = Analysis(columns, found, left_out, rows=len(rows), dropped=dropped)
        if analysis.same_axes:
            analysis.comparisons, untested = compare(found, seed=seed)
            left_out += untested
        if factors:
            chosen = [name.strip() for name in factors.split(",") if name.strip()]
            analysis.effects = factor_effects(rows, columns, chosen, resamples=resamples, seed=seed)
        if held:
            analysis.predictions = held_out(found, held, columns)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error)) from None

    parts = sections(analysis)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").write_text(render_html("plumbline scaling", parts), encoding="utf-8")
        (output / "report.md").write_text(
            render_markdown("plumbline scaling", parts, output / "figures"), encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"output folder {output} cannot be written: {error}") from None
    # E and its intervals are in the report; a terminal is too narrow for them.
    narrow = [[row[place] for place in (0, 1, 3, 2, 6)] for row in fit_rows(found)]
    _print(console, "Fits, 95% bootstrap intervals", narrow)
    for title, table in (
        ("One line or two", comparison_rows(analysis.comparisons)),
        ("What moves the line", effect_rows(analysis.effects)),
        ("Held-out runs", prediction_rows(analysis.predictions)),
    ):
        if len(table) > 1:
            _print(console, title, table)
    for family in found:
        for warning in family.warnings:
            console.print(f"{family.name}: {warning}", highlight=False, markup=False)
    for reason in left_out:
        console.print(f"left out: {reason}", highlight=False, markup=False)
    for paragraph in answer(analysis):
        console.print(f"\n{paragraph}", highlight=False, markup=False)
    console.print(f"\nreport: {output / 'report.html'}", highlight=False, markup=False)


def _print(console: object, title: str, rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table(title=title)
    for place, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    console.print(table)
