"""What else the history knows of each sample: grader health and completion lengths. Streams, like curves.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from plumbline.selection.curves import gathered, merged_samples, only_run

# Reasons that speak of the grader or the gold and not of the policy.
GRADER_FAULTS = ("bad_gold", "error", "timeout")


@dataclass(frozen=True)
class Facts:
    """Of a run's samples.

    Attributes:
        sample_ids: [N].
        rollouts: [N] completions graded.
        faults: [N] of those that say something is wrong with grading or gold (GRADER_FAULTS).
        correct: [N] graded correct.
        tokens: [N] mean completion length in tokens, NaN where it was not recorded.
        reasons: rows of each verdict.
    """

    sample_ids: list[str]
    rollouts: np.ndarray
    faults: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    reasons: dict[str, int]

    @property
    def rows(self) -> int:
        """Completions in all."""
        return int(self.rollouts.sum())

    def suspect(self) -> np.ndarray:
        """[N] bool: at least half of its gradings are faults, so the curve is the grader's and not the policy's."""
        return 2 * self.faults >= np.maximum(self.rollouts, 1)


def sample_facts(folder: str | Path, run: str | Sequence[str] | None = None) -> Facts:
    """Read the facts of one run (None: the only one), or of several read as one.

    Raises FileNotFoundError and ValueError as curves.curves.
    """
    names = [run] if isinstance(run, str) else list(run) if run is not None else [only_run(folder)]
    ids, lookups = merged_samples(folder, names)
    rollouts, faults, correct, counted = (np.zeros(len(ids), dtype=np.int64) for _ in range(4))
    tokens = np.zeros(len(ids))
    reasons: Counter[str] = Counter()
    for name in names:
        lookup = lookups[name]
        known = len(ids) if lookup is None else len(lookup)
        for batches in gathered(folder, name):
            table = pa.Table.from_batches([b.select(["sample", "correct", "reason", "tokens"]) for b in batches])
            sample = table.column("sample").to_numpy()
            inside = sample < known
            if not inside.all():
                table, sample = table.filter(pa.array(inside)), sample[inside]
            sample = sample if lookup is None else lookup[sample]
            np.add.at(rollouts, sample, 1)
            np.add.at(correct, sample, table.column("correct").cast(pa.int64()).to_numpy())
            spelled = table.column("reason").cast(pa.string())
            for entry in spelled.value_counts().to_pylist():
                reasons[entry["values"] or "not recorded"] += entry["counts"]
            verdicts = spelled.to_numpy(zero_copy_only=False)
            np.add.at(faults, sample[np.isin(verdicts.astype(str), GRADER_FAULTS)], 1)
            lengths = table.column("tokens")
            has = ~lengths.is_null().to_numpy()
            np.add.at(tokens, sample[has], lengths.drop_null().to_numpy())
            np.add.at(counted, sample[has], 1)
    mean = np.divide(tokens, counted, out=np.full(len(ids), np.nan), where=counted > 0)
    seen = rollouts > 0
    kept = [sample_id for sample_id, there in zip(ids, seen, strict=True) if there]
    return Facts(kept, rollouts[seen], faults[seen], correct[seen], mean[seen], dict(reasons.most_common()))
