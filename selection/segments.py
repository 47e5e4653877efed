"""The files of a reward history: their layout, and how they are read and repaired. history.py says what they hold."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.ipc as ipc

# What a reader sees and what `append` takes (all but `run`).
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("step", pa.int64()),
        ("epoch", pa.int32()),
        ("sample_id", pa.string()),
        ("rollout", pa.int32()),
        ("policy_version", pa.int64()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("mean_logprob", pa.float64()),
    ]
)
# Columns that no row may leave empty; the others may be null where a log does not have them.
REQUIRED = ("step", "epoch", "sample_id", "rollout", "reward", "correct")
STORED = pa.schema(
    [
        pa.field("sample", pa.int32()) if field.name == "sample_id" else
        pa.field("reason", pa.dictionary(pa.int8(), pa.string())) if field.name == "reason" else field
        for field in SCHEMA
        if field.name != "run"
    ]
)  # fmt: skip
SAMPLES = "samples.txt"
SEGMENT_BYTES = 256 * 2**20
# An Arrow stream that was closed ends in this marker.
END_MARKER = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class TornTail(UserWarning):
    """The last append is incomplete and was left out."""


def runs(folder: str | Path) -> list[str]:
    """Names of the runs a store holds, sorted; empty if there are none."""
    return sorted(path.name for path in Path(folder).glob("*") if path.is_dir() and list_segments(path))


def count_rows(folder: str | Path, run: str) -> int:
    """Rows of a run, without reading them (batch headers only)."""
    return sum(extent(path, None)[0] for path in list_segments(run_folder(folder, run)))


def read_samples(folder: str | Path, run: str) -> list[str]:
    """Sample ids of a run in the order of their codes, which is the order they were first seen in."""
    names, _ = _parse_samples(run_folder(folder, run) / SAMPLES)
    return names


def iterate_stored(folder: str | Path, run: str) -> Iterator[pa.RecordBatch]:
    """The batches of STORED as they lie on disk, mapped and not loaded: any number of rows in one segment's memory.

    May be called while a writer appends. A torn tail is left out with a TornTail warning.

    Raises FileNotFoundError if there is no such run.
    """
    for path in list_segments(run_folder(folder, run)):
        if path.stat().st_size == 0:
            continue
        with pa.memory_map(str(path)) as file:
            try:
                with ipc.open_stream(file) as stream:
                    yield from stream
            except (pa.ArrowInvalid, OSError):
                warnings.warn(
                    f"{path}: the last append is incomplete (still being written, or cut off) and left out",
                    TornTail,
                    stacklevel=2,
                )


def known_runs(folder: str | Path) -> list[str]:
    names = runs(folder)
    if not names:
        raise FileNotFoundError(f"no reward history in {folder}: it holds no run")
    return names


def run_folder(folder: str | Path, run: str) -> Path:
    path = Path(folder) / run
    if not list_segments(path):
        known = runs(folder)
        hint = f"it holds {', '.join(known)}" if known else "it holds no run"
        raise FileNotFoundError(f"no reward history of run {run!r} in {folder}: {hint}")
    return path


def list_segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrows"))


def extent(path: Path, limit: int | None) -> tuple[int, int, bool]:
    """(rows, byte after them, torn) of a segment's complete batches, the first `limit` rows at most."""
    rows, end = 0, 0
    if path.stat().st_size == 0:
        return 0, 0, False
    with pa.memory_map(str(path)) as file:
        try:
            with ipc.open_stream(file) as stream:
                end = file.tell()
                while limit is None or rows < limit:
                    batch = stream.read_next_batch()
                    if limit is not None and rows + batch.num_rows > limit:
                        return rows, end, False
                    rows += batch.num_rows
                    end = file.tell()
                return rows, end, False
        except StopIteration:
            file.seek(end)
            return rows, end, file.read() not in (b"", END_MARKER)
        except (pa.ArrowInvalid, OSError):
            return rows, end, True


def _parse_samples(path: Path) -> tuple[list[str], int]:
    """(ids, byte after the last whole line)."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    # One parse of one array is ten times as fast as a parse a line.
    return json.loads(b"[" + b",".join(data[:end].splitlines()) + b"]"), end


def repair_samples(path: Path) -> list[str]:
    if not path.exists():
        path.touch()
        sync_folder(path.parent)
        return []
    names, end = _parse_samples(path)
    os.truncate(path, end)
    return names


def lock_run(folder: Path) -> IO[bytes]:
    file = (folder / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"run {folder.name!r} in {folder.parent} is being written already; give this run another name"
        ) from None
    return file


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
