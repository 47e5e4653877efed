"""Tables of losses: one row a model, whatever its columns are called.

Read from CSV, Parquet or JSONL, or from what `plumbline evaluate` leaves behind: every `losses.json` under a folder,

    {"model": …, "data": …, "params": N, "tokens": D, "tokenizer": …, "architecture": …,
     "losses": {"NAME": {"per_token": nats, "per_byte": nats, "tokens": n, "bytes": n}}}

becomes a row with the columns model, data, params, tokens, tokenizer, architecture, `NAME` (loss a token) and
`NAME per byte`. Losses a token compare only models of one tokenizer; across tokenizers use the loss a byte.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


class Row(dict[str, Any]):
    """One model's columns; `where` names its table and line for messages."""

    where = ""


def load_rows(paths: Sequence[str | Path]) -> list[Row]:
    """Rows of all files and folders, in order.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without losses.json.
        ValueError: an unreadable or empty table, or an unknown file type.
    """
    rows: list[Row] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.rglob("losses.json"))
            if not found:
                raise FileNotFoundError(
                    f"{path} holds no losses.json; run `plumbline evaluate` with a text set to measure losses"
                )
            rows += [_evaluation(each) for each in found]
        elif not path.is_file():
            raise FileNotFoundError(f"loss table {path} does not exist")
        else:
            for number, columns in enumerate(_file(path), start=1):
                rows.append(Row(columns))
                rows[-1].where = f"{path}, row {number}"
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")
    return rows


def numbers(rows: Sequence[dict[str, Any]], column: str) -> np.ndarray:
    """[n] float64 of a column whose values must all be finite and positive.

    Raises ValueError naming the column (and the nearest one there is), or the table's row (from 1) and its value.
    """
    require(rows, column)
    values = np.empty(len(rows))
    for number, row in enumerate(rows):
        raw = row.get(column)
        try:
            values[number] = float(raw) if raw not in (None, "") else math.nan
        except (TypeError, ValueError):
            raise ValueError(f"{_place(row, number)}: column {column!r}: {raw!r} is not a number") from None
        if not math.isfinite(values[number]) or values[number] <= 0:
            shown = "empty" if raw in (None, "") else f"{raw}"
            raise ValueError(
                f"{_place(row, number)}: column {column!r} is {shown}; losses, sizes and tokens must be finite and "
                "positive (--drop-incomplete leaves such rows out)"
            )
    return values


def _place(row: dict[str, Any], number: int) -> str:
    return getattr(row, "where", "") or f"row {number + 1}"


def require(rows: Sequence[dict[str, Any]], column: str) -> None:
    """ValueError if no row has the column."""
    names = {name: None for row in rows for name in row}
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(list(names)[:12])}"
        raise ValueError(f"the table has no column {column!r}; {hint}")


def drop_incomplete(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[Row], int]:
    """Rows whose named columns all hold finite positive numbers, how many do not. ValueError for no such column."""
    for column in columns:
        require(rows, column)

    def good(row: Row) -> bool:
        for column in columns:
            try:
                value = float(row.get(column) or math.nan)
            except (TypeError, ValueError):
                return False
            if not math.isfinite(value) or value <= 0:
                return False
        return True

    kept = [row for row in rows if good(row)]
    return kept, len(rows) - len(kept)


def _file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
                rows.append(row)
        return rows
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from None
    raise ValueError(
        f"{path}: unknown table type {path.suffix!r}; use .csv, .parquet, .jsonl or a folder of evaluations"
    )


def _evaluation(path: Path) -> Row:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        row = Row({n: record.get(n) for n in ("model", "data", "params", "tokens", "tokenizer", "architecture")})
        row.where = str(path)
        for name, loss in record["losses"].items():
            row[name] = loss["per_token"]
            row[f"{name} per byte"] = loss["per_byte"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of losses: {type(error).__name__}: {error}") from None
    return row
