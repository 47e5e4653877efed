"""plumbline compare: two evaluations of the same problems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of an evaluation.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Folder of the evaluation to compare with it.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder for compare.json and compare.html; none are written without it.")
    ] = None,
) -> None:
    """Paired differences of accuracy with 95% intervals, and the problems whose answers changed."""
    from rich.console import Console

    from plumbline.rl.evaluation.compare import compare as compare_folders
    from plumbline.rl.evaluation.compare import print_comparison, write_comparison
    from plumbline.rl.run_report import write_run_report

    comparisons = compare_folders(a, b)
    console = Console(emoji=False)
    print_comparison(comparisons, str(a), str(b), console)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_comparison(comparisons, output / "compare.json")
        write_run_report([a, b], output / "compare.html")
        console.print(f"figures: {output}", highlight=False)
