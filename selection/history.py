"""The reward history: every graded completion of every run, in one append-only Arrow store.

A folder holds a folder a run; in it:

    samples.txt     one sample id a line (as JSON); the line number, from 0, is the sample's code
    000001.arrows   segments: Arrow IPC streams, one record batch an append, with codes in place of ids
    000002.arrows   …

An append writes new ids first, then the batch, and waits for the disk both times, so a batch never names a sample
that samples.txt lacks. What was being written when the process died is a torn tail: readers leave it out and say so,
the next writer cuts it off. Writers start a new segment when they open and when one grows large, so that an append
costs the same however much is there. A lock keeps two writers out of one run; readers need none.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from plumbline.selection.curves import curves
from plumbline.selection.segments import (
    REQUIRED,
    SAMPLES,
    SCHEMA,
    SEGMENT_BYTES,
    STORED,
    TornTail,
    count_rows,
    extent,
    iterate_stored,
    known_runs,
    list_segments,
    lock_run,
    read_samples,
    repair_samples,
    runs,
    sync_folder,
)

__all__ = [
    "REQUIRED",
    "SCHEMA",
    "HistoryWriter",
    "TornTail",
    "count_rows",
    "curves",
    "export_parquet",
    "iterate_history",
    "read_history",
    "read_samples",
    "runs",
]


class HistoryWriter:
    """Appends one training step at a time.

    Args:
        folder: of the store; made if absent.
        run: name of the run: letters, digits, dot, dash, underscore. Runs share a folder and never mix.

    Attributes:
        offset: rows that are safely on disk. Save it with a checkpoint and give it to `truncate` when resuming.

    Raises:
        ValueError: a name that is no plain name, or another process is writing this run.
    """

    def __init__(self, folder: str | Path, run: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", run):
            raise ValueError(f"run must be a plain name (letters, digits, dot, dash, underscore), got {run!r}")
        self.run = run
        self.folder = Path(folder) / run
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self.folder)
        self.offset = 0
        self._codes = {name: code for code, name in enumerate(repair_samples(self.folder / SAMPLES))}
        for path in list_segments(self.folder):
            rows, end, torn = extent(path, None)
            self.offset += rows
            if torn:
                warnings.warn(
                    f"{path}: the last append was cut off and is dropped; {rows} rows before it stand",
                    TornTail,
                    stacklevel=2,
                )
                os.truncate(path, end)
        self._names: IO[bytes] = (self.folder / SAMPLES).open("ab")
        self._path = self.folder
        self._sink: pa.OSFile | None = None
        self._stream: ipc.RecordBatchStreamWriter | None = None

    def append(self, rows: Sequence[Mapping[str, Any]] | pa.Table | pa.RecordBatch) -> None:
        """Write rows and wait until they are on disk.

        Args:
            rows: dicts, or an Arrow table or batch, with the columns of SCHEMA, `run` left out. All columns must be
                there; those outside REQUIRED may hold null.

        Raises:
            ValueError: a missing column, a null in REQUIRED, a value of the wrong type, a non-finite reward, a
                negative epoch. Nothing is written then.
            OSError: the disk refused. What was written of this append is cut off again.
        """
        table = _checked_table(rows)
        if table.num_rows == 0:
            return
        if self._sink is not None and self._sink.tell() > SEGMENT_BYTES:
            self._end_segment()
        batch = self._encode(table)
        before = 0
        try:
            if self._stream is None:
                self._start_segment()
            assert self._sink is not None
            assert self._stream is not None
            before = self._sink.tell()
            self._stream.write_batch(batch)
            self._sink.flush()
            os.fsync(self._sink.fileno())
        except OSError:
            # A half-written batch would hide every later one from readers.
            self._stream = None
            if self._sink is not None:
                self._sink.close()
                self._sink = None
            if self._path.is_file():
                os.truncate(self._path, before)
            raise
        self.offset += table.num_rows

    def truncate(self, offset: int) -> None:
        """Drop every row after the first `offset`: what a stopped run wrote beyond its last checkpoint.

        Raises ValueError if the store holds fewer rows, or if `offset` lies inside an append.
        """
        if not 0 <= offset <= self.offset:
            raise ValueError(
                f"{self.folder} holds {self.offset} rows; cannot go back to row {offset} of the checkpoint"
            )
        self._end_segment()
        left = offset
        for path in list_segments(self.folder):
            if left == 0:
                path.unlink()
                continue
            rows, end, _ = extent(path, left)
            if rows < left and end < extent(path, None)[1]:
                raise ValueError(f"{path}: row {offset} is inside an append; offsets lie between appends")
            left -= rows
            if left == 0:
                os.truncate(path, end)
        self.offset = offset

    def close(self) -> None:
        """End the segment and let go of the run. Appending afterwards needs a new writer."""
        self._end_segment()
        self._names.close()
        self._lock.close()

    def _encode(self, table: pa.Table) -> pa.RecordBatch:
        """Ids to codes, new ids to samples.txt first."""
        ids = table.column("sample_id").combine_chunks().dictionary_encode()
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks()
        names = ids.dictionary.to_pylist()
        new = [name for name in names if name not in self._codes]
        if new:
            if len(self._codes) + len(new) > np.iinfo(np.int32).max:
                raise ValueError(f"{self.folder}: more than {np.iinfo(np.int32).max:,} samples")
            self._names.write(b"".join(json.dumps(name, ensure_ascii=False).encode() + b"\n" for name in new))
            self._names.flush()
            os.fsync(self._names.fileno())
            for name in new:
                self._codes[name] = len(self._codes)
        lookup = np.array([self._codes[name] for name in names], dtype=np.int32)
        columns = {
            name: table.column(name).combine_chunks() for name in SCHEMA.names if name not in ("run", "sample_id")
        }
        columns["sample"] = pa.array(lookup[ids.indices.to_numpy()], pa.int32())
        arrays = []
        for field in STORED:
            column = columns[field.name]
            arrays.append(column.cast(field.type) if column.type != field.type else column)
        return pa.RecordBatch.from_arrays(
            [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays], schema=STORED
        )

    def _start_segment(self) -> None:
        existing = list_segments(self.folder)
        number = int(existing[-1].stem) + 1 if existing else 1
        self._path = self.folder / f"{number:06d}.arrows"
        self._sink = pa.OSFile(str(self._path), "wb")
        self._stream = ipc.new_stream(self._sink, STORED)
        sync_folder(self.folder)

    def _end_segment(self) -> None:
        if self._stream is not None and self._sink is not None:
            self._stream.close()
            self._sink.close()
        self._stream = self._sink = None

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iterate_history(folder: str | Path, run: str | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of SCHEMA, one an append, in the order written; one run's or every run's, run after run.

    Raises FileNotFoundError if there is no history.
    """
    for name in [run] if run is not None else known_runs(folder):
        ids: pa.Array | None = None
        for batch in iterate_stored(folder, name):
            codes = batch.column("sample")
            if ids is None or pc.max(codes).as_py() >= len(ids):
                # The writer may have named more samples since; ids only ever get longer.
                ids = pa.array(read_samples(folder, name), pa.string())
            columns = {field.name: batch.column(field.name) for field in STORED}
            columns["run"] = pa.array([name], pa.string()).take(pa.array(np.zeros(batch.num_rows, np.int32)))
            columns["sample_id"] = ids.take(codes)
            columns["reason"] = columns["reason"].cast(pa.string())
            yield pa.RecordBatch.from_arrays([columns[column] for column in SCHEMA.names], schema=SCHEMA)


def read_history(folder: str | Path, run: str | None = None) -> pa.Table:
    """All rows in memory, as iterate_history gives them."""
    return pa.Table.from_batches(list(iterate_history(folder, run)), schema=SCHEMA)


def export_parquet(folder: str | Path, path: str | Path, run: str | None = None) -> int:
    """Copy rows to one Parquet file, streaming. Returns how many. Raises FileNotFoundError if there is no history."""
    rows = 0
    pending: list[pa.RecordBatch] = []
    batches = iterate_history(folder, run)
    with pq.ParquetWriter(str(path), SCHEMA, compression="zstd") as writer:
        held = 0
        for batch in batches:
            pending.append(batch)
            held += batch.num_rows
            rows += batch.num_rows
            # Row groups of a training step each would be many and slow to read.
            if held >= 1 << 20:
                writer.write_table(pa.Table.from_batches(pending))
                pending, held = [], 0
        if pending:
            writer.write_table(pa.Table.from_batches(pending))
    return rows


def _checked_table(rows: Sequence[Mapping[str, Any]] | pa.Table | pa.RecordBatch) -> pa.Table:
    wanted = pa.schema([field for field in SCHEMA if field.name != "run"])
    if isinstance(rows, pa.RecordBatch):
        rows = pa.Table.from_batches([rows])
    names = rows.column_names if isinstance(rows, pa.Table) else list(rows[0]) if rows else wanted.names
    missing = [name for name in wanted.names if name not in names]
    if missing:
        raise ValueError(f"history rows lack the column {missing[0]!r}; they have {', '.join(names)}")
    try:
        if isinstance(rows, pa.Table):
            table = rows.select(wanted.names).cast(wanted)
        else:
            table = pa.Table.from_pylist([dict(row) for row in rows], schema=wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"a history row does not fit the columns {', '.join(wanted.names)}: {error}") from None
    for name in REQUIRED:
        if table.column(name).null_count:
            raise ValueError(
                f"history column {name!r} has {table.column(name).null_count} empty values; it must have none"
            )
    if table.num_rows:
        if not pc.all(pc.is_finite(table.column("reward"))).as_py():
            raise ValueError("history column 'reward' holds NaN or infinity")
        if pc.min(table.column("epoch")).as_py() < 0:
            raise ValueError("history column 'epoch' holds a negative number; epochs count from 0")
    return table
