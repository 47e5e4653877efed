"""The training or evaluation set as the loop wants it: problems with their encoded prompts."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plumbline.errors import InputError
from plumbline.rl.batch import Prompt
from plumbline.rl.config import RunConfig
from plumbline.rl.data import DataReport, Problem, load_problems
from plumbline.rl.sections import DataSection, EvaluationSection


class Encoder(Protocol):
    """Makes a prompt of a problem: a policy's Codec, or the messages for a served model."""

    def encode(self, problem: str) -> list[int]: ...


@dataclass(frozen=True)
class Task:
    problem: Problem
    token_ids: list[int]

    def prompt(self, index: int, *, epoch: int = 0, key: int = 0, first_rollout: int = 0) -> Prompt:
        """What a rollout worker is asked; see Prompt for the arguments."""
        problem = self.problem
        return Prompt(index, problem.id, self.token_ids, problem.problem, problem.answer, epoch, key, first_rollout)


class TaskSet:
    """Tasks by sample id, in the data's order.

    Args:
        problems: with unique ids.
        codec: encodes their prompts.
        max_prompt_tokens: longer prompts are dropped; their ids are `too_long`.
        source: named in errors.
    """

    def __init__(self, problems: list[Problem], codec: Encoder, max_prompt_tokens: int, source: str) -> None:
        encoded = [Task(problem, codec.encode(problem.problem)) for problem in problems]
        self.tasks = {task.problem.id: task for task in encoded if len(task.token_ids) <= max_prompt_tokens}
        self.too_long = [problem.id for problem in problems if problem.id not in self.tasks]
        if not self.tasks:
            raise InputError(
                f"{source} leaves no problem to work on ({len(problems)} read, {len(self.too_long)} with prompts over prompt.max_tokens = {max_prompt_tokens})"
            )

    def __getitem__(self, sample_id: str) -> Task:
        return self.tasks[sample_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def keep(self, sample_ids: list[str]) -> TaskSet:
        """The same tasks, these ids only, still in the data's order."""
        wanted = set(sample_ids)
        part = copy.copy(self)
        part.tasks = {sample_id: task for sample_id, task in self.tasks.items() if sample_id in wanted}
        return part

    @property
    def fingerprint(self) -> str:
        """Changes with the ids, their order, the prompts or the golds."""
        digest = hashlib.sha256()
        for sample_id, task in self.tasks.items():
            digest.update(repr((sample_id, task.token_ids, task.problem.answer)).encode())
        return digest.hexdigest()[:16]


def training_tasks(config: RunConfig, codec: Encoder) -> tuple[TaskSet, DataReport]:
    """The training set that config.data describes. InputError when nothing is left."""
    problems, report = read_problems(config.data)
    if config.data.subset is not None:
        problems = keep_subset(problems, Path(config.data.subset))
    if config.data.exclude is not None:
        problems = leave_out(problems, Path(config.data.exclude))
    return _tasks(problems, codec, config, config.data.source, report)


def evaluation_tasks(config: RunConfig, codec: Encoder) -> tuple[TaskSet, DataReport]:
    """The held-out set that config.evaluation describes."""
    if config.evaluation.source is None:
        raise InputError("evaluation.source is not set: name a benchmark or a data source")
    problems, report = read_problems(config.evaluation)
    return _tasks(problems, codec, config, config.evaluation.source, report)


def _tasks(
    problems: list[Problem], codec: Encoder, config: RunConfig, source: str, report: DataReport
) -> tuple[TaskSet, DataReport]:
    tasks = TaskSet(problems, codec, config.prompt.max_tokens, source)
    report.too_long, report.max_prompt_tokens = tasks.too_long, config.prompt.max_tokens
    return tasks, report


def read_problems(section: DataSection | EvaluationSection) -> tuple[list[Problem], DataReport]:
    assert section.source is not None
    fields = section.fields if isinstance(section, DataSection) else {}
    split = section.split if isinstance(section, DataSection) else None
    return load_problems(
        section.source,
        split=split,
        fields=fields,
        limit=section.limit,
        seed=section.seed,
        levels=section.levels,
        families=section.families,
    )


def _listed_ids(path: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InputError(f"{key} {path} cannot be read: {reason}") from None


def leave_out(problems: list[Problem], path: Path) -> list[Problem]:
    """Problems whose ids the file does not list. InputError for a missing file, or when nothing is left."""
    unwanted = set(_listed_ids(path, "data.exclude"))
    kept = [problem for problem in problems if problem.id not in unwanted]
    if not kept:
        raise InputError(f"data.exclude {path} leaves none of the {len(problems)} problems")
    return kept


def keep_subset(problems: list[Problem], path: Path) -> list[Problem]:
    """Problems whose ids the file lists. InputError for a missing file, no match, or ids the data lacks."""
    wanted = _listed_ids(path, "data.subset")
    known = {problem.id for problem in problems}
    missing = [sample_id for sample_id in wanted if sample_id not in known]
    if missing and len(missing) < len(wanted):
        raise InputError(
            f"data.subset {path}: {len(missing)} of {len(wanted)} ids are not in the data, first {missing[0]!r}"
        )
    chosen = set(wanted)
    kept = [problem for problem in problems if problem.id in chosen]
    if not kept:
        raise InputError(f"data.subset {path} selects none of the {len(problems)} problems")
    return kept
