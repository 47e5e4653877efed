"""Checkpoints: written aside, checksummed, renamed into place; the last few kept; a damaged one passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.files import sha256

CHECKSUMS = "checksums.json"
STATE = "trainer.json"


class CheckpointStore:
    """Checkpoints `step-000010/` of one run.

    Each holds `policy/` (a Hugging Face folder), `learner.pt` and `trainer.json`, with SHA-256 sums beside them.

    Args:
        folder: where they stand.
        keep: newest so many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write a checkpoint: `write(folder)` puts the learner's part there, `state` becomes trainer.json."""
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f"partial-{step:06d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(partial)
            (partial / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
            sums = {str(path.relative_to(partial)): sha256(path) for path in _files(partial)}
            (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                error.errno,
                f"checkpoint of step {step} could not be written ({error.strerror}); earlier ones are intact",
                str(final),
            ) from None
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def paths(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def latest(self, console: Console | None = None) -> tuple[Path, dict[str, Any]] | None:
        """The newest intact checkpoint and its trainer state; damaged ones are named and passed over. None if none exists.

        Raises InputError when checkpoints exist and none is intact.
        """
        paths = self.paths()
        for path in reversed(paths):
            problem = damage(path)
            if problem is None:
                return path, json.loads((path / STATE).read_text(encoding="utf-8"))
            if console:
                console.print(f"[yellow]checkpoint {path} is damaged ({problem}); using the one before[/]")
        if paths:
            raise InputError(f"every checkpoint in {self.folder} is damaged; start again with --overwrite")
        return None


def damage(path: Path) -> str | None:
    """None for an intact checkpoint, else what is wrong with it."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {CHECKSUMS}"
    for name, expected in sums.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != expected:
            return f"{name} has changed since it was written"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
