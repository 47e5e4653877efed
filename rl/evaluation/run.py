"""Answering one benchmark: every completion graded and kept, resumable, and the same again from the same settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.evaluation.scores import Evaluation, Row, by_problem, summarise, votes
from plumbline.rl.files import read_rows, write_whole
from plumbline.rl.records import graded_fields
from plumbline.rl.tasks import TaskSet


class GroupSource(Protocol):
    """Whatever answers and grades prompts: the Ray roles, or a served model behind HTTP."""

    def graded_groups(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Groups in any order, as they are graded."""
        ...


class ServedCompletion(Completion):
    """A completion whose token ids stayed with the server.

    Attributes:
        tokens: its length as the server counts; None where the server does not tell.
    """

    def __init__(self, text: str, truncated: bool, tokens: int | None) -> None:
        super().__init__(token_ids=[], logprobs=[], text=text, truncated=truncated)
        self.tokens = tokens


def evaluate(
    name: str,
    tasks: TaskSet,
    source: GroupSource,
    sampling: Sampling,
    completions: int,
    output: Path,
    *,
    shard_problems: int | None = None,
    independent: bool = False,
    resume: bool = False,
    policy: str = "",
    grader: Grader | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer every task `completions` times with the policy that the source holds.

    Completions go to output/<name>.jsonl, sorted by problem, the figures to output/<name>.json.

    A batch's composition decides the last bits of its logits, and so now and then a token. Therefore work is cut into
    shards that depend on the settings alone, and resuming redoes an unfinished shard from its start: a resumed
    evaluation equals one that never stopped.

    Args:
        name: file name of the results.
        tasks: the benchmark.
        source: with workers begun.
        sampling: temperature 0 answers greedily (then one completion is enough).
        completions: of each problem.
        output: folder, made if absent.
        shard_problems: problems answered together; None: all.
        independent: completions do not depend on what else is in the batch, so any finished problem is kept.
        resume: go on with output/<name>.partial.jsonl, or read finished results back.
        policy: whose answers these are, kept with the settings.
        grader: compares answers for maj@k; None makes one.
        progress: called with (answered, all) at the start and after each problem.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    prompts = [tasks[sample_id].prompt(index) for index, sample_id in enumerate(tasks)]
    whole, partial = output / f"{name}.jsonl", output / f"{name}.partial.jsonl"
    earlier_seconds = 0.0
    rows: list[Row] = []
    if resume and whole.exists():
        rows = read_rows(whole)
        earlier_seconds = _recorded_seconds(output / f"{name}.json")
    elif resume and partial.exists():
        rows = [row for group in by_problem(read_rows(partial)).values() if len(group) == completions for row in group]
    done = set(by_problem(rows))
    size = len(prompts) if independent else shard_problems or len(prompts)
    shards = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    if not independent:
        shards = [shard for shard in shards if any(prompt.sample_id not in done for prompt in shard)]
        redone = {prompt.sample_id for shard in shards for prompt in shard}
        rows = [row for row in rows if row["sample_id"] not in redone]
    else:
        shards = [[prompt for prompt in shard if prompt.sample_id not in done] for shard in shards]
    answered = len(by_problem(rows))
    if progress:
        progress(answered, len(prompts))
    if any(shards):
        _write(partial, rows)
        with partial.open("a", encoding="utf-8") as file, nullcontext(grader) if grader else Grader() as judge:
            for shard in filter(None, shards):
                fresh: list[Row] = []
                for group in source.graded_groups(shard, completions, sampling):
                    made = completion_rows(group, tasks, judge if completions > 1 else None)
                    fresh += made
                    answered += 1
                    if independent:
                        _append(file, made)
                    if progress:
                        progress(answered, len(prompts))
                if not independent:
                    _append(file, fresh)
                rows += fresh
        order = {prompt.sample_id: prompt.index for prompt in prompts}
        rows.sort(key=lambda row: (order[row["sample_id"]], row["rollout"]))
        _write(whole, rows)
        partial.unlink()
    result = summarise(name, rows, earlier_seconds + time.monotonic() - began)
    result.settings = settings_of(policy, sampling, completions)
    write_whole(output / f"{name}.json", json.dumps(result.as_dict(), indent=1) + "\n")
    return result


def settings_of(policy: str, sampling: Sampling, completions: int) -> dict[str, Any]:
    """What decides an evaluation's answers, besides the problems."""
    return {
        "policy": policy,
        "completions_per_problem": completions,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }


def finished_evaluation(
    name: str, tasks: TaskSet, sampling: Sampling, completions: int, output: Path, policy: str
) -> Evaluation | None:
    """What an earlier `evaluate` of the same policy, problems and settings left in `output`; None if there is none."""
    figures, rows = output / f"{name}.json", output / f"{name}.jsonl"
    if not figures.is_file() or not rows.is_file():
        return None
    tree = json.loads(figures.read_text(encoding="utf-8"))
    if tree["settings"] != settings_of(policy, sampling, completions) or set(tree["per_problem"]) != set(tasks):
        return None
    result = summarise(name, read_rows(rows), tree["seconds"])
    result.settings = tree["settings"]
    return result


def completion_rows(group: Group, tasks: TaskSet, grader: Grader | None) -> list[Row]:
    """One row a completion. `vote` numbers the distinct answers of the problem (None without a grader)."""
    extras = tasks[group.prompt.sample_id].problem.extras
    chosen: list[int | None] = [None] * len(group.completions)
    if grader is not None:
        chosen = votes(group.answers, group.correct, grader)
    about = {name: str(extras[name]) for name in ("level", "subject") if extras.get(name) is not None}
    return [
        {
            "sample_id": group.prompt.sample_id,
            "rollout": number,
            **about,
            **graded_fields(group, number),
            "vote": chosen[number],
            "tokens": completion.tokens if isinstance(completion, ServedCompletion) else len(completion.token_ids),
            "truncated": completion.truncated,
        }
        for number, completion in enumerate(group.completions)
    ]


def _write(path: Path, rows: list[Row]) -> None:
    """Replace a file as a whole: whenever the process is killed, the old or the new content is there."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        _append(file, rows)
    os.replace(fresh, path)


def _append(file: Any, rows: list[Row]) -> None:
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _recorded_seconds(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.exists() else 0.0
