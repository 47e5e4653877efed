"""plumbline report: one page for a run, or for several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of training runs, pipelines or evaluations.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option(help="The page; default RUN/run.html for one run, runs.html for several.")
    ] = None,
) -> None:
    """Write one static page: training curves, evaluations with intervals, settings; several runs share every figure."""
    from plumbline.rl.run_report import write_run_report

    path = output or (runs[0] / "run.html" if len(runs) == 1 else Path("runs.html"))
    write_run_report(runs, path)
    print(f"report: {path}")
