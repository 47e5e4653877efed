"""Reward histories of other trainers, and tables of curves.

Each importer reads what its trainer writes by itself and appends it to a history of ours:

    TRL        `log_completions=True`: completions/completions_00010.parquet with step, prompt, completion, a column a
               reward function, advantage
    verl       `trainer.rollout_data_dir`: 10.jsonl with input, output, score, step, and acc if the reward says so
    OpenRLHF   LIMR's fork: step_10.json, a list of {prompt, reward}

Where a log has no id, the sample id is the hash of the prompt, as for data without ids. Where it has no epoch, a
sample's epoch is how often it was seen in earlier steps. A completion counts as correct from `correct_at` on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from plumbline.selection.history import HistoryWriter

Row = dict[str, Any]


def prompt_id(prompt: Any) -> str:
    """16 hex digits of a prompt: of its text, or of the last user message of a conversation."""
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        spoken = [turn.get("content", "") for turn in turns if turn.get("role") == "user"]
        prompt = spoken[-1] if spoken else json.dumps(prompt, ensure_ascii=False)
    return hashlib.sha256(str(prompt).encode()).hexdigest()[:16]


def detect(path: Path) -> str | None:
    """`plumbline`, `trl`, `verl`, `openrlhf` or `curves`; None for none of them."""
    if path.is_file():
        return "curves" if path.suffix in (".csv", ".parquet") else None
    if any(path.glob("*/*.arrows")) or any(path.glob("history/*/*.arrows")):
        return "plumbline"
    if _files(path, r"completions_(\d+)\.parquet") or _files(path / "completions", r"completions_(\d+)\.parquet"):
        return "trl"
    if _files(path, r"step_(\d+)\.json"):
        return "openrlhf"
    if _files(path, r"(\d+)\.jsonl"):
        return "verl"
    return None


def import_trl(
    log: str | Path,
    folder: str | Path,
    run: str,
    *,
    reward: str | None = None,
    id_column: str | None = None,
    correct_at: float = 1.0,
) -> int:
    """Import TRL's completion logs.

    Args:
        log: the trainer's output folder, or its `completions` folder.
        folder, run: the history to append to.
        reward: column of the reward function; None if there is one.
        id_column: column with the sample id (log it with `log_extra`); None hashes the prompt.
        correct_at: rewards from here on are correct.

    Returns:
        rows imported.

    Raises:
        FileNotFoundError: no logs. ValueError: columns missing or ambiguous, or bad values.
    """
    log = Path(log)
    files = _files(log, r"completions_(\d+)\.parquet") or _files(log / "completions", r"completions_(\d+)\.parquet")

    def read(path: Path, step: int) -> Iterator[Row]:
        try:
            table = pq.read_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
        chosen = reward
        if chosen is None:
            fixed = {"step", "prompt", "completion", "advantage", "images", id_column}
            numeric = [f.name for f in table.schema if f.name not in fixed and pa.types.is_floating(f.type)]
            if len(numeric) != 1:
                raise ValueError(
                    f"{path} has {len(numeric)} columns that may be the reward ({', '.join(numeric)}); name one"
                )
            chosen = numeric[0]
        for row in table.to_pylist():
            yield {**row, "reward": _need(row, chosen, path), "step": row.get("step", step)}

    return _import(files, f"TRL completion logs in {log}", read, folder, run, "prompt", id_column, correct_at)


def import_verl(
    log: str | Path, folder: str | Path, run: str, *, id_column: str | None = None, correct_at: float = 1.0
) -> int:
    """Import verl's rollout dumps; `acc`, where it is there, says what is correct. The rest as import_trl."""

    def read(path: Path, step: int) -> Iterator[Row]:
        for row in _jsonl(path):
            correct = {"correct": bool(row["acc"])} if row.get("acc") is not None else {}
            yield {**row, "reward": _need(row, "score", path), "step": row.get("step", step), **correct}

    files = _files(Path(log), r"(\d+)\.jsonl")
    return _import(files, f"verl rollout dumps in {log}", read, folder, run, "input", id_column, correct_at)


def import_openrlhf(
    log: str | Path, folder: str | Path, run: str, *, id_column: str | None = None, correct_at: float = 1.0
) -> int:
    """Import the samples that LIMR's OpenRLHF writes, one step_N.json a step. Arguments and errors as import_trl."""

    def read(path: Path, step: int) -> Iterator[Row]:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        for row in rows:
            yield {**row, "reward": _need(row, "reward", path), "step": step}

    files = _files(Path(log), r"step_(\d+)\.json")
    return _import(files, f"OpenRLHF samples in {log}", read, folder, run, "prompt", id_column, correct_at)


def read_curves_table(path: str | Path, value: str = "correct") -> tuple[list[str], np.ndarray]:
    """Curves from a CSV or Parquet file, wide or long.

    Wide: a column `id` (or `sample_id`) and a number column an epoch, in order; empty = epoch missing. Where some of
    the columns' names hold a number and others do not, it is refused: a level is no epoch. Long: `id`, `epoch` (from 0
    or 1) and one of `correct`, `reward`, `accuracy`; several rows of a sample in an epoch are averaged.

    Args:
        path: of the table.
        value: `correct` or `reward`: which of the columns of a long table to prefer where it has both.

    Returns:
        (sample ids, curves [N, K]).

    Raises:
        FileNotFoundError: no such file. ValueError: no rows, no id column, no numbers, a repeated id (wide), columns
            of which some are no epochs, or bad values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"table of curves {path} does not exist")
    table = _table(path)
    key = next((name for name in ("sample_id", "id") if name in table.column_names), None)
    if key is None:
        raise ValueError(f"{path} has no column id or sample_id; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows")
    ids = ["" if each is None else str(each) for each in table.column(key).to_pylist()]
    if "" in ids:
        raise ValueError(f"{path}, column {key}: {ids.count(''):,} rows have no id")
    order = ("reward", "correct", "accuracy") if value == "reward" else ("correct", "accuracy", "reward")
    column = next((name for name in order if name in table.column_names), None)
    if "epoch" in table.column_names and column is not None:
        epoch = _floats(table.column("epoch"), f"{path}, column epoch")
        if np.isnan(epoch).any() or (epoch < 0).any() or (epoch % 1 != 0).any():
            raise ValueError(f"{path}, column epoch: epochs must be whole numbers from 0")
        place = (epoch - epoch.min()).astype(np.int64) if epoch.min() in (0, 1) else epoch.astype(np.int64)
        names, row = np.unique(np.array(ids, dtype=object).astype(str), return_inverse=True)
        sums, counts = (np.zeros((len(names), int(place.max()) + 1)) for _ in range(2))
        measured = _floats(table.column(column), f"{path}, column {column}")
        has = ~np.isnan(measured)
        np.add.at(sums, (row[has], place[has]), measured[has])
        np.add.at(counts, (row[has], place[has]), 1)
        return names.tolist(), np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    numeric = [
        f.name for f in table.schema
        if f.name != key and (pa.types.is_floating(f.type) or pa.types.is_integer(f.type) or pa.types.is_null(f.type))
    ]  # fmt: skip
    if not numeric:
        raise ValueError(f"{path} has no number column; a wide table has one an epoch, a long one epoch and reward")
    unnumbered = [name for name in numeric if not re.search(r"\d", name)]
    if unnumbered and len(unnumbered) < len(numeric):
        raise ValueError(
            f"{path}: columns {', '.join(unnumbered)} do not look like epochs beside "
            f"{', '.join(name for name in numeric if name not in unnumbered)}; leave them out"
        )
    repeated = [sample_id for sample_id, times in Counter(ids).items() if times > 1]
    if repeated:
        raise ValueError(f"{path}: id {repeated[0]!r} stands in more than one row ({len(repeated)} such ids)")
    return ids, np.column_stack([_floats(table.column(name), f"{path}, column {name}") for name in numeric])


def _import(
    files: list[tuple[int, Path]],
    what: str,
    read: Callable[[Path, int], Iterable[Row]],
    folder: str | Path,
    run: str,
    prompt: str,
    id_column: str | None,
    correct_at: float,
) -> int:
    if not files:
        raise FileNotFoundError(f"no {what}")
    seen: dict[str, int] = {}
    with HistoryWriter(folder, run) as writer:
        if writer.offset:
            raise ValueError(
                f"history {writer.folder} already holds {writer.offset} rows; import into a new folder or run"
            )
        for step, path in files:
            rows: list[Row] = []
            rollout: dict[str, int] = {}
            for row in read(path, step):
                sample_id = str(_need(row, id_column, path)) if id_column else prompt_id(_need(row, prompt, path))
                reward = float(row["reward"])
                if not math.isfinite(reward):
                    raise ValueError(f"{path}: a reward is {reward}")
                number = rollout.get(sample_id, 0)
                rollout[sample_id] = number + 1
                rows.append(
                    {
                        "step": int(row["step"]),
                        "epoch": int(row["epoch"]) if row.get("epoch") is not None else seen.get(sample_id, 0),
                        "sample_id": sample_id,
                        "rollout": number,
                        "policy_version": None,
                        "reward": reward,
                        "correct": row.get("correct", reward >= correct_at),
                        "reason": None,
                        "tokens": None,
                        "truncated": None,
                        "mean_logprob": None,
                    }
                )
            for sample_id in rollout:
                seen[sample_id] = seen.get(sample_id, 0) + 1
            writer.append(rows)
        return writer.offset


def _files(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """(number, path) of files whose name matches, in the order of the number in it."""
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in found if match)


def _need(row: Row, column: str, path: Path) -> Any:
    if row.get(column) is None:
        raise ValueError(f"{path}: a row has no {column!r}; it has {', '.join(row)}")
    return row[column]


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def _table(path: Path) -> pa.Table:
    import pyarrow.csv

    try:
        if path.suffix != ".csv":
            return pq.read_table(path)
        # Ids stay as they are spelled: 007 is not 7.
        spelled = pyarrow.csv.ConvertOptions(column_types={"id": pa.string(), "sample_id": pa.string()})
        return pyarrow.csv.read_csv(path, convert_options=spelled)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _floats(column: pa.ChunkedArray, where: str) -> np.ndarray:
    try:
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{where}: {error}") from None
    if np.isinf(values).any():
        raise ValueError(f"{where} holds infinity")
    return np.asarray(values, dtype=np.float64)
