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
    credit: Annotated[
        float, typer.Option(help="A reward of at least this claims that the answer is right; 0: only the verdict does.")
    ] = 0.5,
) -> None:
    """Grade a run's completions again with a second checker, and look for reward hacking and wrong golds.

    Ends with exit code 1 when a stop threshold is passed.
    """
    from plumbline.errors import InputError
    from plumbline.rewards.checking.checker import RewardChecker, Thresholds
    from plumbline.rewards.checking.report import check_run

    folder = out or run
    if not run.is_dir():
        raise InputError(f"{run} is no folder; give the output folder of a training run")
    if not 0 < share <= 1 or processes < 1:
        raise InputError(f"--share ({share:g}) must be above 0 and at most 1, --processes ({processes}) at least 1")
    thresholds = Thresholds(credit=credit if credit > 0 else None)
    try:
        with RewardChecker(share, thresholds, processes=processes) as checker:
            summary = check_run(run, folder, checker)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    totals = summary["totals"]
    print(
        f"{summary['decision']}: {totals.get('completions', 0)} completions, {totals.get('regraded', 0)} graded again"
    )
    for reason in summary["reasons"]:
        print(f"- {reason}")
    print(f"report: {folder / 'check.html'}")
    if summary["decision"] == "stop":
        raise typer.Exit(1)
