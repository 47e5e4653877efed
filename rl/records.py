"""What a step leaves behind: history rows, the completions themselves, the training batch, the metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plumbline.rl.batch import Group, TrainingBatch
from plumbline.rl.files import write_whole


def history_rows(groups: list[Group], step: int) -> list[dict[str, Any]]:
    """One row a completion, with the columns of selection/history.py."""
    return [
        {
            "step": step,
            "epoch": group.prompt.epoch,
            "sample_id": group.prompt.sample_id,
            "rollout": group.prompt.first_rollout + number,
            "policy_version": group.policy_version,
            "reward": group.rewards[number],
            "correct": group.correct[number],
            "reason": group.reasons[number],
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
            "mean_logprob": sum(completion.logprobs) / len(completion.logprobs),
        }
        for group in groups
        for number, completion in enumerate(group.completions)
    ]


def graded_fields(group: Group, number: int) -> dict[str, Any]:
    """What every record of a completion tells of it: its text, and what the grader made of that."""
    return {
        "problem": group.prompt.text,
        "response": group.completions[number].text,
        "gold": group.prompt.gold,
        "answer": group.answers[number],
        "correct": group.correct[number],
        "reason": group.reasons[number],
    }


def completion_rows(step: int, groups: list[Group]) -> list[dict[str, Any]]:
    """One row a completion, with its text and verdict: what the completion log keeps and the reward check reads."""
    return [
        {
            "step": step,
            "sample_id": group.prompt.sample_id,
            "rollout": group.prompt.first_rollout + number,
            **graded_fields(group, number),
            "reward": group.rewards[number],
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
        }
        for group in groups
        for number, completion in enumerate(group.completions)
    ]


class CompletionLog:
    """Every completion with its verdict, one JSONL file a step (what `plumbline check` reads).

    Args:
        folder: made if absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, groups: list[Group]) -> None:
        path = self.folder / f"step-{step:06d}.jsonl"
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in completion_rows(step, groups)))

    def drop_after(self, step: int) -> None:
        """Remove the files of later steps."""
        for path in self.folder.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()


def training_batch(groups: list[Group]) -> TrainingBatch:
    """Groups of one size, in order."""
    completions = [completion for group in groups for completion in group.completions]
    return TrainingBatch(
        prompt_ids=[group.prompt.token_ids for group in groups for _ in group.completions],
        completion_ids=[completion.token_ids for completion in completions],
        logprobs=[completion.logprobs for completion in completions],
        rewards=[reward for group in groups for reward in group.rewards],
        group_size=len(groups[0].completions),
    )


def step_metrics(groups: list[Group], rollout_seconds: float, step_seconds: float) -> dict[str, float]:
    """Averages over all completions graded in the step; seconds; completion tokens a second of rollout and grading."""
    rewards = [reward for group in groups for reward in group.rewards]
    correct = [value for group in groups for value in group.correct]
    reasons = Counter(reason for group in groups for reason in group.reasons)
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    truncated = [completion.truncated for group in groups for completion in group.completions]
    flat = sum(len(set(group.rewards)) == 1 for group in groups)
    n = len(rewards)
    metrics = {
        "reward/mean": sum(rewards) / n,
        "reward/correct": sum(correct) / n,
        "reward/groups_without_signal": flat / len(groups),
        "rollout/completion_tokens": sum(lengths) / n,
        "rollout/truncated": sum(truncated) / n,
        "rollout/tokens_per_second": sum(lengths) / max(rollout_seconds, 1e-9),
        "rollout/completions": float(n),
        "time/rollout_seconds": rollout_seconds,
        "time/step_seconds": step_seconds,
    }
    for reason in ("no_answer", "malformed", "timeout", "bad_gold", "error"):
        metrics[f"grader/{reason}"] = reasons[reason] / n
    return metrics


def state_metrics(
    groups: list[Group], samples: int, learner_version: int, stalls: Mapping[str, float]
) -> dict[str, float]:
    """How the step stood between its roles, and what selection has to choose from.

    Args:
        groups: of the step.
        samples: in the training set.
        learner_version: of the weights that learnt from the groups.
        stalls: {role: seconds of the step in which its workers had nothing to do}.
    """
    ages = [learner_version - group.policy_version for group in groups]
    carried = [len(completion.versions) > 1 for group in groups for completion in group.completions]
    shares = [sum(group.correct) / len(group.correct) for group in groups]
    return {
        "rollout/staleness": sum(ages) / len(ages),
        "rollout/staleness_max": float(max(ages)),
        "rollout/carried_over": sum(carried) / len(carried),
        **{f"stall/{role}_seconds": seconds for role, seconds in stalls.items()},
        "selection/epoch": float(max(group.prompt.epoch for group in groups)),
        "selection/samples": float(samples),
        "selection/solved": sum(share == 1 for share in shares) / len(shares),
        "selection/unsolved": sum(share == 0 for share in shares) / len(shares),
    }
