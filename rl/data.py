"""Problems from anywhere, in one schema, with everything odd about them reported by row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline.errors import InputError
from plumbline.rewards.extraction import last_boxed
from plumbline.rl.procedural import SPLITS, generate

# Column names that public sets use for each field, the first found wins.
ALIASES = {
    "id": ("id", "unique_id", "problem_id", "ID"),
    "problem": ("problem", "question", "prompt", "Problem"),
    "answer": ("answer", "final_answer", "ground_truth", "gold", "Answer", "solution"),
}
FILE_TYPES = (".jsonl", ".json", ".parquet")

# Benchmarks by name: files that PLUMBLINE_DATA may hold, then the hub's id and split.
BENCHMARKS: dict[str, tuple[str, str, str, str | None]] = {
    "aime24": ("aime24.jsonl", "HuggingFaceH4/aime_2024", "train", None),
    "aime25": ("aime25.jsonl", "yentinglin/aime_2025", "train", None),
    "amc23": ("amc23.jsonl", "math-ai/amc23", "test", None),
    "math500": ("math500.jsonl", "HuggingFaceH4/MATH-500", "test", None),
    "gsm8k": ("gsm8k/test.jsonl", "openai/gsm8k", "test", "main"),
}
SHOWN_ROWS = 5


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: unique in its set.
        problem: statement.
        answer: the gold, never empty.
        extras: every other column, as it came.
    """

    id: str
    problem: str
    answer: str
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataReport:
    """What was read and what was wrong with it (row numbers count from 1).

    Attributes:
        source: where from.
        rows: read.
        kept: problems that remain.
        empty_golds, missing, duplicate_ids: rows dropped, by reason. `missing` names the field.
        same_text: (row, earlier row) with one statement under two ids; both are kept.
        too_long, max_prompt_tokens: ids of kept rows whose prompts are longer than that, which no run will see.
    """

    source: str
    rows: int = 0
    kept: int = 0
    empty_golds: list[int] = field(default_factory=list)
    missing: list[tuple[int, str]] = field(default_factory=list)
    duplicate_ids: list[tuple[int, int]] = field(default_factory=list)
    same_text: list[tuple[int, int]] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    max_prompt_tokens: int = 0

    def lines(self) -> list[str]:
        """For a person: one line for the set, one for each kind of trouble."""
        out = [f"data {self.source}: {self.kept:,} of {self.rows:,} rows kept"]
        if self.empty_golds:
            out.append(f"  {len(self.empty_golds)} empty golds dropped: rows {_shown(self.empty_golds)}")
        if self.missing:
            names = [f"{row} ({name})" for row, name in self.missing]
            out.append(f"  {len(self.missing)} rows with a missing field dropped: rows {_shown(names)}")
        if self.duplicate_ids:
            pairs = [f"{row} (as {first})" for row, first in self.duplicate_ids]
            out.append(f"  {len(self.duplicate_ids)} duplicate ids dropped: rows {_shown(pairs)}")
        if self.same_text:
            pairs = [f"{row} (as {first})" for row, first in self.same_text]
            out.append(f"  {len(self.same_text)} problem(s) stand under two ids, kept: rows {_shown(pairs)}")
        if self.too_long:
            limit = f"prompt.max_tokens = {self.max_prompt_tokens}"
            out.append(f"  {len(self.too_long)} prompts over {limit} dropped: ids {_shown(self.too_long)}")
        return out


def load_problems(
    source: str,
    *,
    split: str | None = None,
    fields: dict[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    levels: list[int] | None = None,
    families: list[str] | None = None,
) -> tuple[list[Problem], DataReport]:
    """Read a data set.

    Args:
        source: a benchmark name, `procedural:train` or `procedural:heldout`, `reasoning-gym:<task>`, a local .jsonl,
            .json or .parquet file, a folder written by `datasets`, or a hub id (`owner/name`, `owner/name:config`).
        split: of a hub set or a `datasets` folder; None is `train`, or the only one.
        fields: our field name -> their column, where the usual names do not fit.
        limit: keep the first so many good problems (generated sources: make so many, 1,000 by default).
        seed: of generated sources.
        levels: keep problems whose `level` is one of these.
        families: of procedural sources; None is all.

    Returns:
        (problems, report). Empty golds, missing fields and repeated ids are dropped and counted.

    Raises:
        InputError: unknown source, unreadable file, unknown column, or nothing left.
    """
    renamed = fields or {}
    unknown = sorted(set(renamed) - set(ALIASES))
    if unknown:
        raise InputError(f"data.fields: {unknown[0]!r} is no field of ours; rename id, problem or answer")
    report = DataReport(source)
    problems: list[Problem] = []
    first_id: dict[str, int] = {}
    first_text: dict[str, int] = {}
    for number, row in enumerate(_rows(source, split, limit, seed, levels, families), start=1):
        report.rows = number
        if limit is not None and len(problems) == limit:
            report.rows = number - 1
            break
        problem = _problem(row, number, renamed, report)
        if problem is None:
            continue
        if levels is not None and str(problem.extras.get("level")) not in {str(level) for level in levels}:
            continue
        if problem.id in first_id:
            report.duplicate_ids.append((number, first_id[problem.id]))
            continue
        first_id[problem.id] = number
        text = problem.problem.strip()
        if text in first_text:
            report.same_text.append((number, first_text[text]))
        first_text.setdefault(text, number)
        problems.append(problem)
    report.kept = len(problems)
    if not problems:
        reasons = "; ".join(line.strip() for line in report.lines()[1:]) or "it has no rows"
        raise InputError(f"{source} holds no usable problem: {reasons}")
    return problems, report


def _problem(row: dict[str, Any], number: int, renamed: dict[str, str], report: DataReport) -> Problem | None:
    found: dict[str, Any] = {}
    used: set[str] = set()
    for name, aliases in ALIASES.items():
        columns = (renamed[name],) if name in renamed else aliases
        column = next((c for c in columns if row.get(c) is not None), None)
        if column is None:
            if name in renamed and number == 1 and renamed[name] not in row:
                raise InputError(
                    f"{report.source} has no column {renamed[name]!r} (data.fields.{name}); "
                    f"it has {', '.join(map(str, row))}"
                )
            if name != "id":
                report.missing.append((number, name))
                return None
            continue
        found[name] = row[column]
        used.add(column)
    answer = _gold(str(found["answer"]))
    if not answer:
        report.empty_golds.append(number)
        return None
    statement = str(found["problem"])
    if not statement.strip():
        report.missing.append((number, "problem"))
        return None
    sample_id = str(found.get("id", "")).strip() or hashlib.sha256(statement.encode()).hexdigest()[:16]
    return Problem(sample_id, statement, answer, {k: v for k, v in row.items() if k not in used})


def _gold(text: str) -> str:
    """The answer in a gold column, which in some sets holds a whole solution."""
    if "####" in text:
        # GSM8K's hub rows: the solution, then the number.
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    # MATH-style solutions box their answer.
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def _rows(
    source: str,
    split: str | None,
    limit: int | None,
    seed: int,
    levels: list[int] | None,
    families: list[str] | None,
) -> Iterable[dict[str, Any]]:
    kind, _, rest = source.partition(":")
    if kind == "procedural":
        if rest not in SPLITS:
            raise InputError(
                f"unknown source {source!r}; procedural sources are {', '.join(f'procedural:{s}' for s in SPLITS)}"
            )
        made = generate(rest, limit or 1000, seed, families=families, levels=levels)
        return (
            {"id": p.id, "problem": p.problem, "answer": p.answer, "family": p.family, "level": p.level} for p in made
        )
    if kind == "reasoning-gym":
        return _reasoning_gym(rest, limit or 1000, seed)
    if source in BENCHMARKS:
        return _benchmark(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _datasets_folder(path, split)
    if path.is_file():
        return _file(path)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix not in FILE_TYPES:
        name, _, config = source.partition(":")
        return _hub(name, config or None, split)
    if path.suffix or "/" in source:
        raise InputError(f"data file {source} does not exist")
    raise InputError(
        f"unknown benchmark or data source {source!r}; known names: {', '.join(BENCHMARKS)}, procedural:train, "
        "procedural:heldout; else give a file, a `datasets` folder or a hub id (owner/name)"
    )


def _benchmark(name: str) -> Iterable[dict[str, Any]]:
    file, hub, split, config = BENCHMARKS[name]
    folder = os.environ.get("PLUMBLINE_DATA")
    if folder:
        path = Path(folder).expanduser() / file
        if not path.is_file():
            raise InputError(f"benchmark {name}: PLUMBLINE_DATA is set, but {path} does not exist")
        return _file(path)
    return _hub(hub, config, split)


def _file(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return iter(pq.read_table(path).to_pylist())
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} is not a readable Parquet file: {_line(error)}") from None
    if path.suffix not in FILE_TYPES:
        raise InputError(f"{path}: unknown file type {path.suffix!r}; use {', '.join(FILE_TYPES)}")
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {_line(error)}") from None
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {_line(error)}") from None
        if not isinstance(rows, list):
            raise InputError(f"{path} must hold a list of problems")
        numbered: Iterable[tuple[int, Any]] = enumerate(rows, start=1)
    else:
        numbered = _json_lines(path, text)
    for number, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: expected an object, found {type(row).__name__}")
        yield row


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Only line feeds end a row: str.splitlines would also cut at U+2028 inside a statement.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, row {number} is not JSON: {_line(error)}") from None


def _datasets_folder(path: Path, split: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a folder written by datasets.save_to_disk: {_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_pick_split(list(loaded), split, str(path))]
    return iter(loaded)


def _hub(name: str, config: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    from plumbline.hub import hub_reason, quiet_hub

    try:
        with quiet_hub():
            loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the hub client raises a different type for every way of failing
        raise InputError(
            f"data set {name} can be read neither as a local path nor from the hub: {hub_reason(error)}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_pick_split(list(loaded), split, name)]
    return iter(loaded)


def _pick_split(names: list[str], wanted: str | None, source: str) -> str:
    choice = wanted or ("train" if "train" in names else names[0] if len(names) == 1 else None)
    if choice not in names:
        raise InputError(f"{source} has no split {choice or 'train'!r}; it has {', '.join(names)}")
    return choice


def _reasoning_gym(task: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError:
        raise InputError("reasoning-gym sources need the package: pip install 'plumbline-rl[reasoning-gym]'") from None
    try:
        made = reasoning_gym.create_dataset(task, size=count, seed=seed)
    except ValueError as error:
        raise InputError(f"reasoning-gym has no usable task {task!r}: {_line(error)}") from None
    for number, entry in enumerate(made):
        yield {
            "id": f"{task}-{seed}-{number}",
            "problem": entry["question"],
            "answer": entry["answer"],
            "metadata": entry["metadata"],
        }


def _shown(items: list[Any]) -> str:
    text = ", ".join(str(item) for item in items[:SHOWN_ROWS])
    return text + (f" and {len(items) - SHOWN_ROWS} more" if len(items) > SHOWN_ROWS else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
