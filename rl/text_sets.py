"""Texts to measure a loss on: files of documents, read under a name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline.errors import InputError

TEXT_TYPES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TextSet:
    """Documents under a name, none of them empty."""

    name: str
    source: str
    documents: list[str]


def read_text_sets(specs: Sequence[str], *, column: str = "text", limit: int | None = None) -> list[TextSet]:
    """Read text sets.

    Args:
        specs: files, each as `path` (the set's name is the file's, without its ending) or `name=path`. A .txt file is
            one document; a .jsonl or .parquet file has one a row.
        column: of the text in .jsonl and .parquet files.
        limit: first so many documents of each.

    Raises:
        InputError: a file that is missing, unreadable or of another type, a missing column, a row without text, no
            documents, or two sets of one name.
    """
    sets: list[TextSet] = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        named = bool(separator) and not Path(spec).exists()
        path = Path(rest if named else spec).expanduser()
        name = name.strip() if named else path.stem
        if not path.is_file():
            raise InputError(f"text set {path} does not exist")
        documents = [text for text in _documents(path, column, limit) if text]
        if not documents:
            raise InputError(f"text set {path} holds no text")
        if not name or any(name == other.name for other in sets):
            raise InputError(f"text sets need names that differ; give {path} another as NAME={path}")
        sets.append(TextSet(name, str(path), documents))
    return sets


def _documents(path: Path, column: str, limit: int | None) -> list[str]:
    if path.suffix not in TEXT_TYPES:
        raise InputError(f"text set {path}: unknown file type {path.suffix!r}; use {', '.join(TEXT_TYPES)}")
    try:
        if path.suffix == ".txt":
            return [path.read_text(encoding="utf-8")]
        if path.suffix == ".jsonl":
            return list(_lines(path, column, limit))
    except UnicodeDecodeError as error:
        raise InputError(f"text set {path} is not UTF-8 text: {error}") from None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise InputError(f"text set {path} has no column {column!r}; it has {', '.join(table.schema_arrow.names)}")
        found: list[str] = []
        for batch in table.iter_batches(columns=[column]):
            found += [_text(value, path, len(found) + n) for n, value in enumerate(batch.column(0).to_pylist(), 1)]
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"text set {path} is not a readable Parquet file: {error}") from None


def _lines(path: Path, column: str, limit: int | None) -> Iterator[str]:
    rows = 0
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if rows == limit:
                return
            rows += 1
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"text set {path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict) or column not in row:
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise InputError(f"text set {path}, line {number} has no {column!r}; it has {has}")
            yield _text(row[column], path, number)


def _text(value: Any, path: Path, number: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"text set {path}, row {number}: expected text, found {type(value).__name__}")
    return value
