"""plumbline convert: a public checkpoint as a policy folder, with full or Native Sparse Attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="smollm2, embedded, a folder, a .gguf file, or a hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    attention: Annotated[str, typer.Option(help="full or nsa.")] = "nsa",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's.")] = None,
) -> None:
    """Write a checkpoint as a policy folder; with nsa, its function stays the same up to 1,024 tokens."""
    import torch

    from plumbline.errors import InputError
    from plumbline.models.convert import convert as write

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise InputError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    try:
        policy = write(checkpoint, out, attention=attention, dtype=dtypes[dtype])
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise InputError(str(error)) from error
    count = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{out}: {policy.config.attention} attention, {count / 1e6:.1f} M parameters, {policy.dtype}")
    if policy.config.attention == "nsa":
        nsa = policy.config.nsa_config
        reach = nsa.count * nsa.select_block
        print(f"a query selects {nsa.count} blocks of {nsa.select_block} tokens: everything, up to {reach:,} tokens")
