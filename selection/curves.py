"""Reward curves out of the history: what a sample earned at each epoch. Streams; only the table itself is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from plumbline.selection.segments import iterate_stored, read_samples, runs

# What a curve can measure, and that in words.
VALUES = {"correct": "share of a sample's rollouts correct", "reward": "mean reward of a sample's rollouts"}
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
    tally = _Successes(wide * len(ids)) if value == "correct" else _Rewards(wide * len(ids))
    for name in names:
        lookup = codes_of[name]
        for batches in gathered(folder, name):
            table = pa.Table.from_batches([batch.select(["epoch", "sample", value]) for batch in batches])
            epoch = table.column("epoch").to_numpy()
            sample = table.column("sample").to_numpy()
            # Samples and epochs first seen after reading began have no place; their rows belong to the next reading.
            known = len(ids) if lookup is None else len(lookup)
            wanted = (sample < known) & (epoch < wide)
            if not wanted.all():
                table = table.filter(pa.array(wanted))
                epoch, sample = epoch[wanted], sample[wanted]
            place = epoch.astype(np.int64)
            place *= len(ids)
            place += sample if lookup is None else lookup[sample]
            tally.add(place, table.column(value))
    mean = tally.mean().reshape(wide, len(ids))
    seen = np.zeros(len(ids), dtype=bool)
    for row in mean:
        seen |= ~np.isnan(row)
    if not seen.all():
        # Named, but every row of it was cut off again when the run went back to a checkpoint.
        return [sample_id for sample_id, kept in zip(ids, seen, strict=True) if kept], mean.T[seen]
    return ids, mean.T


class _Successes:
    """Counts rollouts and successes of many places in one table: a row costs one visit to memory, not two."""

    # A place holds its rollouts in the upper half and its successes in the lower.
    ROLLOUT = 1 << 32

    def __init__(self, places: int) -> None:
        self.packed = np.zeros(places, dtype=np.int64)

    def add(self, place: np.ndarray, correct: pa.ChunkedArray) -> None:
        np.add.at(self.packed, place, correct.cast(pa.int64()).to_numpy() + self.ROLLOUT)

    def mean(self) -> np.ndarray:
        """[places] float64, NaN where nothing was counted. Takes the table's own memory."""
        result = self.packed.view(np.float64)
        with np.errstate(invalid="ignore"):
            for start in range(0, len(result), GATHERED_ROWS):
                part = self.packed[start : start + GATHERED_ROWS]
                result[start : start + GATHERED_ROWS] = (part & (self.ROLLOUT - 1)) / (part >> 32)
        return result


class _Rewards:
    """Sums rewards of many places."""

    def __init__(self, places: int) -> None:
        self.sums = np.zeros(places)
        self.counts = np.zeros(places, dtype=np.int32)

    def add(self, place: np.ndarray, reward: pa.ChunkedArray) -> None:
        np.add.at(self.sums, place, reward.to_numpy())
        np.add.at(self.counts, place, np.int32(1))

    def mean(self) -> np.ndarray:
        """[places] float64, NaN where nothing was counted. Takes the table's own memory."""
        with np.errstate(invalid="ignore"):
            self.sums /= self.counts
        return self.sums


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
