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

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Evaluation:
        """The inverse of as_dict."""
        return cls(
            name=tree["benchmark"],
            accuracy=Interval(**tree["accuracy"]),
            by_level={level: Interval(**interval) for level, interval in tree["by_level"].items()},
            tokens=tree["mean_tokens"],
            truncated=tree["truncated"],
            no_answer=tree["no_answer"],
            per_problem=tree["per_problem"],
            seconds=tree["seconds"],
            settings=tree["settings"],
        )


def evaluate(
    name: str,
    tasks: TaskSet,
    roles: Roles,
    sampling: Sampling,
    completions: int,
    output: Path,
    *,
    policy: str = "",
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
        policy: whose answers these are, kept with the settings.
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
    result.settings = settings_of(policy, sampling, completions)
    summary = output / f"{name}.json.partial"
    summary.write_text(json.dumps(result.as_dict(), indent=1), encoding="utf-8")
    os.replace(summary, output / f"{name}.json")
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
    path = output / f"{name}.json"
    if not path.is_file():
        return None
    result = Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8")))
    same = result.settings == settings_of(policy, sampling, completions) and set(result.per_problem) == set(tasks)
    return result if same else None


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
