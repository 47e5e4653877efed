"""Checkpoints: written aside while training goes on, checksummed, renamed into place; the last few kept; a damaged one passed over."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.files import sha256

CHECKSUMS = "checksums.json"
STATE = "trainer.json"


class Writer(Protocol):
    """Who writes the learner's part."""

    def save(self, folder: Path) -> None:
        """Copy the state and start to write it into the folder."""
        ...

    def written(self, *, wait: bool) -> dict[str, str] | None:
        """SHA-256 by path in the folder once everything is written, None until then. Raises what kept it from that."""
        ...


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint whose files are being written."""

    step: int
    folder: Path
    state: str
    writer: Writer


class CheckpointStore:
    """Checkpoints `step-000010/` of one run.

    Each holds what a Writer puts there (`policy/`, a Hugging Face folder, among it) and `trainer.json`, with SHA-256 sums
    beside them. Its files are written while training goes on, in `partial-000010-…/`, which gets its name once all are
    there: `begin`, then `poll` now and then. As a context manager the store waits for the last one at the end, also when
    training ends with an error.

    Args:
        folder: where they stand.
        keep: newest so many stay.

    Attributes:
        newest: the one that was last finished, or read; None at first.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.newest: Path | None = None
        self.unfinished: Unfinished | None = None

    def begin(self, step: int, state: dict[str, Any], writer: Writer) -> None:
        """Start a checkpoint: `writer` writes the learner's part, `state` becomes trainer.json. Waits for the one before.

        Raises OSError when that one, or the start of this one, could not be written.
        """
        self.poll(wait=True)
        text = json.dumps({"step": step, **state})  # now: training goes on, and the state may be its own lists
        for left in self.folder.glob("partial-*"):  # by a killed process, which may still be at it: hence the odd name
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f"partial-{step:06d}-{uuid.uuid4().hex[:8]}"
        with self._reported(step, partial):
            partial.mkdir(parents=True)
            writer.save(partial)
        self.unfinished = Unfinished(step, partial, text, writer)

    def poll(self, *, wait: bool = False) -> None:
        """Give the checkpoint that is being written its name if it is whole; with `wait`, once it is.

        Raises OSError when it could not be written; earlier ones are intact then.
        """
        if self.unfinished is None:
            return
        step, partial = self.unfinished.step, self.unfinished.folder
        with self._reported(step, partial):
            sums = self.unfinished.writer.written(wait=wait)
            if sums is None:
                return
            (partial / STATE).write_text(self.unfinished.state, encoding="utf-8")
            sums = {**sums, STATE: sha256(partial / STATE)}
            (partial / CHECKSUMS).write_text(json.dumps(sums, indent=1, sort_keys=True), encoding="utf-8")
            self.newest = self.folder / f"step-{step:06d}"
            shutil.rmtree(self.newest, ignore_errors=True)
            partial.rename(self.newest)
        self.unfinished = None
        # Later ones are damaged, or of a run that was resumed from before them: none may outlive one that is whole.
        whole = [path for path in self.paths() if path.name <= self.newest.name]
        for path in self.paths():
            if path not in whole[-self.keep :]:
                shutil.rmtree(path)

    @contextmanager
    def _reported(self, step: int, partial: Path) -> Iterator[None]:
        """Within the block, a failure takes the partial checkpoint away; one of the disk is told in a line."""
        try:
            yield
        except BaseException as error:
            self.unfinished = None
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise OSError(
                    error.errno,
                    f"checkpoint of step {step} could not be written ({error.strerror}); earlier ones are intact",
                    str(self.folder / f"step-{step:06d}"),
                ) from error
            raise

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.poll(wait=True)
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"the last checkpoint is missing too: {failure}")

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
                self.newest = path
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
