"""The command line. One file a command; heavy imports wait until the command runs.

Exit codes: 0 success, 2 bad input (one clear line on standard error), 1 anything else.
"""

from __future__ import annotations

import sys

import typer

from plumbline import __version__
from plumbline.cli.adapt import adapt
from plumbline.cli.build_embedded import build_embedded
from plumbline.cli.check import check
from plumbline.cli.compare import compare
from plumbline.cli.convert import convert
from plumbline.cli.evaluate import evaluate
from plumbline.cli.monitoring import monitoring
from plumbline.cli.report import report
from plumbline.cli.run import run
from plumbline.cli.scaling import scaling
from plumbline.cli.select import select
from plumbline.cli.train import train
from plumbline.errors import InputError, RewardsUnsound, RunStopped

app = typer.Typer(
    name="plumbline",
    help="Reinforcement learning on rule-checked maths, and the selection of the samples that matter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    run,
    train,
    select,
    evaluate,
    compare,
    report,
    monitoring,
    check,
    convert,
    adapt,
    scaling,
    build_embedded,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        print(f"plumbline {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point of the `plumbline` console script."""
    try:
        app()
    except (InputError, FileNotFoundError) as error:
        print(f"plumbline: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (RewardsUnsound, RunStopped) as error:
        print(f"plumbline: {error}", file=sys.stderr)
        raise SystemExit(1) from None
