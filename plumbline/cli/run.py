"""plumbline run: select, train and evaluate in one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/quickstart.yaml.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in the output folder.")
    ] = False,
) -> None:
    """Record a reward history, select with LIM, train full / random / LIM arms, evaluate, report."""
    from rich.console import Console

    from plumbline.rl.config import load_config
    from plumbline.rl.launch import launch_pipeline

    launch_pipeline(load_config(config, overrides or []), Console(emoji=False), resume=resume, overwrite=overwrite)
