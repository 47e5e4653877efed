"""A public checkpoint as a policy folder of ours."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from plumbline.models.load import load_policy, load_tokenizer, policy_folder
from plumbline.models.policy import Policy

# What load_tokenizer and generate read beside the tokenizer's own files.
COMPANIONS = ("generation_config.json", "prompt.json")


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    attention: str | None = "nsa",
    nsa: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """Write a checkpoint as our Hugging Face folder, tokenizer included.

    With attention="nsa" a dense checkpoint gets three copies of its keys and values, gates (0, 1, 0) and the mean as
    phi: the same function up to count x select_block tokens (arXiv 2502.11089 gives the attention).

    Args:
        checkpoint: as load_policy takes it: a folder, a .gguf file, `smollm2`, `embedded`, or a hub id.
        out: a folder that does not exist or is empty; it appears whole or not at all.
        attention: `full`, `nsa`, or None to keep the checkpoint's.
        nsa: settings of NSAConfig other than the defaults, for a dense checkpoint made sparse.
        dtype: of the weights written; None keeps the checkpoint's.

    Returns:
        The policy written.

    Raises:
        FileNotFoundError, ValueError: as load_policy; ValueError also if `out` holds anything.
    """
    target = empty_target(out)
    policy = load_policy(checkpoint, attention=attention, nsa=nsa, dtype=dtype)
    save_folder(policy, checkpoint, target)
    return policy


def empty_target(out: str | Path) -> Path:
    """The folder to write. ValueError if it holds anything or is a file."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; choose another output or remove it")
    return target


def save_folder(policy: Policy, checkpoint: str | Path, target: Path) -> None:
    """Write a policy with the tokenizer and companions of the checkpoint it came from; whole or not at all."""
    source = policy_folder(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        policy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        partial.chmod(0o755)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
