"""Files that a killed process leaves whole, and reading those it was still writing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: whenever the process is killed, the old or the new content is there."""
    fresh = path.with_name(path.name + ".new")
    with writing(fresh):
        fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a torn last line (the process was killed) is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_refusal(folder: Path) -> OSError | None:
    """What the system says to a megabyte more in this folder; None if it takes it.

    Libraries that write files often hide the system's error in an exception of their own.
    """
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        probe.unlink(missing_ok=True)
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, a refusal of the system names the file: one that comes when a buffer is emptied does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
