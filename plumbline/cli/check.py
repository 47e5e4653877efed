"""plumbline check: the reward-checking stage over a run's completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(
    run: Annotated[Path, typer.Argument(help="Output folder of a training run.", show_default=False)],
    share: Annotated[float, typer.Option(help="Share of completions that the second checker grades again.")] = 1.0,
    out: Annotated[
        Path | None, typer.Option(help="Where check.html, check.json and check_cases.jsonl go; RUN by default.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes of the second checker.")] = 1,
) -> None:
    """Grade a run's completions again with a second checker, and look for reward hacking and wrong golds."""
    from plumbline.errors import InputError
    from plumbline.rewards.checking.checker import RewardChecker
    from plumbline.rewards.checking.report import check_run

    folder = out or run
    try:
        with RewardChecker(share, processes=processes) as checker:
            summary = check_run(run, folder, checker)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from None
    print(
        f"{summary['decision']}: {summary['totals'].get('completions', 0)} completions, {summary['totals'].get('regraded', 0)} graded again"
    )
    for reason in summary["reasons"]:
        print(f"- {reason}")
    print(f"report: {folder / 'check.html'}")
