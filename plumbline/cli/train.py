"""plumbline train: one training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see configs/.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as you like.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest intact checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete what an earlier run left in the output folder.")
    ] = False,
) -> None:
    """Train a policy with reinforcement learning on rule-checked problems."""
    from rich.console import Console

    from plumbline.rl.config import load_config
    from plumbline.rl.launch import launch_training

    launch_training(load_config(config, overrides or []), Console(emoji=False), resume=resume, overwrite=overwrite)
