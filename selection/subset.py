"""Writing a selection: ids, all scores, and the kept problems as JSONL, Parquet and `datasets` folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.selection.methods import Selection


def write_subset(
    selection: Selection, folder: str | Path, problems: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Path]:
    """Write a selection.

    Args:
        selection: what was kept.
        folder: made if absent. Files of an earlier selection are replaced.
        problems: id -> columns of the problem (problem, answer, …); None writes ids and scores only.

    Returns:
        ids.txt, scores.parquet, subset.jsonl, subset.parquet, dataset/ (in that order).

    Raises:
        ValueError: nothing was kept, or a kept sample is not among the problems.
        OSError: the folder cannot be written.
    """
    kept = selection.ids
    if not kept:
        raise ValueError(nothing_kept(selection))
    missing = [sample_id for sample_id in kept if problems is not None and sample_id not in problems]
    if missing:
        raise ValueError(f"{len(missing)} of {len(kept)} kept samples are not in the data, the first is {missing[0]!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("ids.txt", "scores.parquet", "subset.jsonl", "subset.parquet", "dataset")]
    paths[0].write_text("".join(f"{sample_id}\n" for sample_id in kept), encoding="utf-8")
    pq.write_table(
        pa.table(
            {
                "id": pa.array(selection.sample_ids, pa.string()),
                "score": pa.array(selection.scores, pa.float64(), from_pandas=True),
                "kept": pa.array(selection.kept),
                "incomplete": pa.array(selection.incomplete),
            }
        ),
        paths[1],
    )
    rows = []
    for sample_id, score in zip(kept, selection.scores[selection.kept], strict=True):
        columns = dict(problems[sample_id]) if problems is not None else {}
        rows.append({"id": sample_id, **columns, "selection_score": float(score)})
    with paths[2].open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, paths[3])
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(str(paths[4]))
    if not hidden:
        datasets.enable_progress_bars()
    return paths


def nothing_kept(selection: Selection) -> str:
    """Why, and what to change, in one line."""
    known = selection.scores[~np.isnan(selection.scores)]
    if not len(known):
        return f"{selection.method} scores none of {len(selection.scores):,} samples: no curve is complete enough"
    return (
        f"{selection.method} selects nothing: no score of {len(known):,} samples fits ({selection.rule}); "
        f"the highest is {known.max():.3g}, the median {np.median(known):.3g}: lower the threshold, or ask for a count"
    )
