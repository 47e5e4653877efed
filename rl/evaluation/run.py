"""Answering a benchmark with a policy and grading the answers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plumbline.rl.batch import Group, Prompt, Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.stats import Interval, mean_interval
from plumbline.rl.tasks import TaskSet


@dataclass
class Evaluation:
    """One benchmark's answers and what they come to.

    Attributes:
        name: the benchmark.
        accuracy: mean over problems of the share of right completions.
        by_level: the same for each level, where problems carry one.
        tokens: mean completion length.
        truncated, no_answer: shares of completions.
        per_problem: sample id -> share of right completions.
        seconds: wall time.
    """

    name: str
    accuracy: Interval
    by_level: dict[str, Interval]
    tokens: float
    truncated: float
    no_answer: float
    per_problem: dict[str, float]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "accuracy": self.accuracy.as_dict(),
            "by_level": {level: interval.as_dict() for level, interval in self.by_level.items()},
            "mean_tokens": self.tokens,
            "truncated": self.truncated,
            "no_answer": self.no_answer,
            "seconds": self.seconds,
            "settings": self.settings,
            "per_problem": self.per_problem,
        }


def evaluate(
    name: str,
    tasks: TaskSet,
    roles: Roles,
    sampling: Sampling,
    completions: int,
    output: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer every task `completions` times with the policy that the rollout workers hold.

    Completions go to output/<name>.jsonl as they are graded, the summary to output/<name>.json.

    Args:
        name: file name of the results.
        tasks: the benchmark.
        roles: with rollout and reward workers begun.
        sampling: temperature 0 answers greedily (then one completion is enough).
        completions: of each problem.
        output: folder, made if absent.
        progress: called with (answered, all) after each problem.
    """
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    prompts = [
        Prompt(
            index,
            sample_id,
            tasks[sample_id].token_ids,
            tasks[sample_id].problem.problem,
            tasks[sample_id].problem.answer,
        )
        for index, sample_id in enumerate(tasks)
    ]
    groups: list[Group] = []
    partial = output / f"{name}.partial.jsonl"
    with partial.open("w", encoding="utf-8") as file:
        for group in roles.graded_groups(prompts, completions, sampling):
            groups.append(group)
            for row in completion_rows(group):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if progress:
                progress(len(groups), len(prompts))
    os.replace(partial, output / f"{name}.jsonl")
    groups.sort(key=lambda group: group.prompt.index)
    result = summarise(name, groups, tasks, time.monotonic() - began)
    result.settings = {
        "completions_per_problem": completions,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
    }
    (output / f"{name}.json").write_text(json.dumps(result.as_dict(), indent=1), encoding="utf-8")
    return result


def completion_rows(group: Group) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": group.prompt.sample_id,
            "rollout": number,
            "problem": group.prompt.text,
            "response": completion.text,
            "gold": group.prompt.gold,
            "answer": group.answers[number],
            "correct": group.correct[number],
            "reason": group.reasons[number],
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
        }
        for number, completion in enumerate(group.completions)
    ]


def summarise(name: str, groups: list[Group], tasks: TaskSet, seconds: float) -> Evaluation:
    """Accuracy with intervals over problems, lengths and rates."""
    per_problem = {group.prompt.sample_id: float(np.mean(group.correct)) for group in groups}
    by_level: dict[str, list[float]] = {}
    for sample_id, value in per_problem.items():
        level = tasks[sample_id].problem.extras.get("level")
        if level is not None:
            by_level.setdefault(str(level), []).append(value)
    completions = [completion for group in groups for completion in group.completions]
    reasons = [reason for group in groups for reason in group.reasons]
    return Evaluation(
        name=name,
        accuracy=mean_interval(np.array(list(per_problem.values()))),
        by_level={level: mean_interval(np.array(values)) for level, values in sorted(by_level.items())},
        tokens=float(np.mean([len(completion.token_ids) for completion in completions])),
        truncated=float(np.mean([completion.truncated for completion in completions])),
        no_answer=float(np.mean([reason == "no_answer" for reason in reasons])),
        per_problem=per_problem,
        seconds=seconds,
    )
