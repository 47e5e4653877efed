"""plumbline build-embedded: the tiny policy that ships with the package, from nothing but a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build_embedded(
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; default: the package's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything.")] = 0,
) -> None:
    """Train the embedded policy anew: tokenizer, worked solutions, mixed demonstrations, model card."""
    from plumbline.errors import InputError
    from plumbline.models.load import EMBEDDED
    from plumbline.rl.coldstart import build

    folder = out or EMBEDDED
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
    build(folder, seed)
    print(f"{folder}: written; README.md there says what it can do")
