"""A reward history from inside TRL's GRPOTrainer, for those who train there and select here.

    recorder = HistoryCallback("history", run="grpo-1", id_column="id")
    trainer = GRPOTrainer(..., reward_funcs=recorder.record(my_reward), callbacks=[recorder])

TRL hands completions to reward functions only, and steps to callbacks only; this is both. Rows are written once a
training step. On several processes each writes a run of its own, `grpo-1-rank0`, …; read them with run=[...] as one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from plumbline.selection.history import HistoryWriter
from plumbline.selection.importers import prompt_id

RewardFunction = Callable[..., list[float | None]]


class HistoryCallback(TrainerCallback):
    """Records what a reward function returns.

    Args:
        folder: of the history.
        run: name of the run.
        id_column: column of the training set that holds the sample id; None hashes the prompt.
        correct_at: rewards from here on are correct.
    """

    def __init__(self, folder: str | Path, run: str, *, id_column: str | None = None, correct_at: float = 1.0) -> None:
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
        self.writer = HistoryWriter(folder, run if ranks == 1 else f"{run}-rank{rank}")
        self.id_column, self.correct_at = id_column, correct_at
        self.rows: list[dict[str, Any]] = []
        self.seen: dict[str, int] = {}
        self.generated: dict[str, int] = {}

    def record(self, reward: RewardFunction) -> RewardFunction:
        """The same reward function, recorded. Give it to one only of several reward functions."""

        @functools.wraps(reward)
        def recorded(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
            rewards = reward(prompts=prompts, completions=completions, **columns)
            self._take(prompts, rewards, columns)
            return rewards

        return recorded

    def _take(self, prompts: list[Any], rewards: list[float | None], columns: dict[str, Any]) -> None:
        state = columns.get("trainer_state")
        if self.id_column is not None and self.id_column not in columns:
            raise ValueError(
                f"the training set has no column {self.id_column!r} for sample ids; it has {', '.join(columns)}"
            )
        ids = [str(i) for i in columns[self.id_column]] if self.id_column else [prompt_id(prompt) for prompt in prompts]
        lengths = columns.get("completion_ids") or [None] * len(ids)
        for sample_id, reward, tokens in zip(ids, rewards, lengths, strict=True):
            # TRL: None where this reward function does not apply to the sample.
            if reward is None:
                continue
            number = self.generated.get(sample_id, 0)
            self.generated[sample_id] = number + 1
            self.rows.append(
                {
                    "step": state.global_step + 1 if state is not None else 0,
                    "epoch": self.seen.get(sample_id, 0),
                    "sample_id": sample_id,
                    "rollout": number,
                    "policy_version": state.global_step if state is not None else None,
                    "reward": float(reward),
                    "correct": float(reward) >= self.correct_at,
                    "reason": None,
                    "tokens": None if tokens is None else len(tokens),
                    "truncated": None,
                    "mean_logprob": None,
                }
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """When resuming, drop the steps after the checkpoint: they will be made again."""
        from plumbline.selection.history import iterate_history

        if self.writer.offset == 0:
            return
        kept = 0
        self.seen = {}
        for batch in iterate_history(self.writer.folder.parent, self.writer.run):
            if batch.column("step")[0].as_py() > state.global_step:
                break
            kept += batch.num_rows
            for sample_id in set(batch.column("sample_id").to_pylist()):
                self.seen[sample_id] = self.seen.get(sample_id, 0) + 1
        self.writer.truncate(kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the step's rows."""
        self._flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation calls the reward function too; what it graded is no training."""
        self.rows, self.generated = [], {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what is left and let go of the run."""
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        self.writer.append(self.rows)
        for sample_id in self.generated:
            self.seen[sample_id] = self.seen.get(sample_id, 0) + 1
        self.rows, self.generated = [], {}
