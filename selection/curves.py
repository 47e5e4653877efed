"""Reward curves out of the history: what a sample earned at each epoch. Streams; only the table itself is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plumbline.selection.segments import iterate_stored, read_samples, runs

VALUES = ("correct", "reward")
# Appends of small steps are gathered to this many rows before they are counted.
GATHERED_ROWS = 1 << 20


def curves(
    folder: str | Path,
    *,
    value: str = "correct",
    run: str | Sequence[str] | None = None,
    epochs: int | None = None,
) -> tuple[list[str], np.ndarray]:
    """The mean over a sample's rollouts at each epoch. Rows of one sample in one epoch count together, however many.

    Args:
        folder: of the store.
        value: `correct` (share of rollouts graded correct) or `reward` (mean reward).
        run: a run's name; several are read as one (the ranks of one distributed run); None is the only run.
        epochs: read the first so many epochs only, to leave out a last one that was cut short.

    Returns:
        (sample ids [N] in the order first seen, curves [N, K] float64), NaN where a sample was not seen in an epoch.
        Samples without a row in the epochs read are left out.

    Raises:
        FileNotFoundError: no history.
        ValueError: another `value`; `run` is None and the store holds several runs; `epochs` below 1.
    """
    if value not in VALUES:
        raise ValueError(f"value must be correct or reward, got {value!r}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    names = [run] if isinstance(run, str) else list(run) if run is not None else [only_run(folder)]
    ids, codes_of = merged_samples(folder, names)
    wide = epochs if epochs is not None else 1 + max(_last_epoch(folder, name) for name in names)
    # Epoch by epoch, so that rows of one stretch of training fall close together in memory.
    sums = np.zeros((wide, len(ids)))
    counts = np.zeros((wide, len(ids)), dtype=np.int32)
    for name in names:
        lookup = codes_of[name]
        for batches in gathered(folder, name):
            table = pa.Table.from_batches([batch.select(["epoch", "sample", value]) for batch in batches])
            epoch = table.column("epoch").to_numpy()
            sample = table.column("sample").to_numpy()
            earned = table.column(value)
            weight = (earned.cast(pa.uint8()) if value == "correct" else earned).to_numpy().astype(np.float64)
            # Samples and epochs first seen after reading began have no place; their rows belong to the next reading.
            known = len(ids) if lookup is None else len(lookup)
            wanted = (sample < known) & (epoch < wide)
            if not wanted.all():
                epoch, sample, weight = epoch[wanted], sample[wanted], weight[wanted]
            place = epoch.astype(np.int64) * len(ids) + (sample if lookup is None else lookup[sample])
            np.add.at(sums.reshape(-1), place, weight)
            np.add.at(counts.reshape(-1), place, np.int32(1))
    seen = np.zeros(len(ids), dtype=bool)
    for row, number in zip(sums, counts, strict=True):
        np.divide(row, number, out=row, where=number > 0)
        row[number == 0] = np.nan
        seen |= number > 0
    if not seen.all():
        # Named, but every row of it was cut off again when the run went back to a checkpoint.
        return [sample_id for sample_id, kept in zip(ids, seen, strict=True) if kept], sums.T[seen]
    return ids, sums.T


def only_run(folder: str | Path) -> str:
    """The name of the one run a store holds. Raises FileNotFoundError for none and ValueError for several."""
    names = runs(folder)
    if not names:
        raise FileNotFoundError(f"no reward history in {folder}: it holds no run")
    if len(names) > 1:
        raise ValueError(
            f"{folder} holds {len(names)} runs, whose epochs are not the same thing: name one of {', '.join(names)}"
        )
    return names[0]


def merged_samples(folder: str | Path, names: list[str]) -> tuple[list[str], dict[str, np.ndarray | None]]:
    """Ids over all runs, and each run's codes as places among them (None where they are the same)."""
    first = read_samples(folder, names[0])
    if len(names) == 1:
        return first, {names[0]: None}
    place = {sample_id: number for number, sample_id in enumerate(first)}
    lookup: dict[str, np.ndarray | None] = {}
    for name in names:
        own = read_samples(folder, name)
        lookup[name] = np.array([place.setdefault(sample_id, len(place)) for sample_id in own], dtype=np.int64)
    return list(place), lookup


def _last_epoch(folder: str | Path, name: str) -> int:
    return max((pc.max(batch.column("epoch")).as_py() for batch in iterate_stored(folder, name)), default=-1)


def gathered(folder: str | Path, name: str) -> Iterator[list[pa.RecordBatch]]:
    """The batches of a run, in lists of about GATHERED_ROWS rows."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in iterate_stored(folder, name):
        held.append(batch)
        rows += batch.num_rows
        if rows >= GATHERED_ROWS:
            yield held
            held, rows = [], 0
    if held:
        yield held
