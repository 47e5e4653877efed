"""Samplers that spend rollouts where groups are mixed: a group that is all right or all wrong has no advantage to
learn from.

DAPO throws such groups away after rolling them out, GRESO skips prompts likely to give them, SPEED finds out with a few
rollouts before it pays for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from plumbline.selection.samplers import (
    CurriculumSampler,
    Draw,
    PrioritisedSampler,
    Sampler,
    UniformSampler,
)


class DynamicSampler(UniformSampler):
    """DAPO's dynamic sampling (arXiv 2503.14476): groups all right or all wrong are dropped, the batch refilled."""

    def keeps(self, sample_id: str, correct: Sequence[bool]) -> bool:
        """Whether the group is mixed."""
        return 0 < sum(correct) < len(correct)


class GresoSampler(DynamicSampler):
    """GRESO (arXiv 2506.02177): before rolling out, skip a prompt with probability 1 - p^z.

    z counts the prompt's last groups in a row without variance. p, the chance to explore, is one for prompts last all
    right and one for those last all wrong; after each update it moves by `step` towards the wanted share of such
    groups: down while more of them come in than `easy_share` or `hard_share`, up otherwise. Groups without variance
    are dropped.

    Args:
        easy_share, hard_share: wanted shares of all-right and all-wrong groups among those rolled out.
        explore: p at first.
        floor: p never falls below.
        step: how far p moves an update.
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        seed: int,
        *,
        easy_share: float = 1 / 12,
        hard_share: float = 1 / 6,
        explore: float = 0.5,
        floor: float = 0.05,
        step: float = 0.01,
    ) -> None:
        super().__init__(sample_ids, seed)
        self.shares = {"easy": easy_share, "hard": hard_share}
        self.explore = {"easy": explore, "hard": explore}
        self.floor, self.step = floor, step
        self.flat = np.zeros(len(self.sample_ids), dtype=np.int64)
        self.easy = np.zeros(len(self.sample_ids), dtype=bool)
        self.skipped = 0

    def skip_probability(self, sample_id: str) -> float:
        """1 - p^z of a sample now; 0 if its last group was mixed, or it has none."""
        place = self.place[sample_id]
        return 1 - self.explore["easy" if self.easy[place] else "hard"] ** int(self.flat[place])

    def next(self, count: int) -> list[Draw]:
        """The next `count` prompts that are not skipped. What is skipped has its turn again in the next epoch."""
        draws: list[Draw] = []
        looked_at = 0
        while len(draws) < count:
            position = self.drawn
            (draw,) = super().next(1)
            looked_at += 1
            # A set of which all is flat would be skipped for ever: after ten passes take what comes.
            lucky = np.random.default_rng([self.seed, 0x5C1B, position]).random() >= self.skip_probability(
                draw.sample_id
            )
            if lucky or looked_at > 10 * len(self.sample_ids):
                draws.append(draw)
            else:
                self.skipped += 1
        return draws

    def update(self, outcomes: Mapping[str, Sequence[bool]]) -> None:
        """Count flat groups and move the chances to explore."""
        if not outcomes:
            return
        found = {"easy": 0, "hard": 0}
        for sample_id, correct in outcomes.items():
            place = self.place[sample_id]
            if self.keeps(sample_id, correct):
                self.flat[place] = 0
            else:
                kind = "easy" if all(correct) else "hard"
                found[kind] += 1
                self.flat[place] += 1
                self.easy[place] = kind == "easy"
        for kind, wanted in self.shares.items():
            move = -self.step if found[kind] / len(outcomes) >= wanted else self.step
            self.explore[kind] = float(np.clip(self.explore[kind] + move, self.floor, 1.0))

    def metrics(self) -> dict[str, float]:
        """skipped: prompts passed over so far; explore_easy, explore_hard: chances to try a flat one."""
        return {"skipped": float(self.skipped), **{f"explore_{kind}": p for kind, p in self.explore.items()}}

    def _state(self) -> dict[str, Any]:
        return {
            **super()._state(),
            "flat": self.flat.tolist(),
            "easy": self.easy.tolist(),
            "explore": dict(self.explore),
            "skipped": self.skipped,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.flat = np.array(state["flat"], dtype=np.int64)
        self.easy = np.array(state["easy"], dtype=bool)
        self.explore = {kind: float(value) for kind, value in state["explore"].items()}
        self.skipped = int(state["skipped"])


class SpeedSampler(Sampler):
    """SPEED (arXiv 2506.09016): a small screening rollout first, the rest of the group only for middling prompts.

    `next` asks for the rest of the groups that passed, then for new prompts to screen. A prompt passes if its screening
    success rate lies strictly between `low` and `high`.

    Args:
        screening: rollouts of the first look.
        completions: size of a whole group.
        low, high: bounds of the success rate, both excluded.

    Raises:
        ValueError: screening not smaller than the group, or bounds out of order.
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        seed: int,
        *,
        screening: int = 4,
        completions: int = 16,
        low: float = 0.0,
        high: float = 1.0,
    ) -> None:
        super().__init__(sample_ids, seed)
        if not 1 <= screening < completions:
            raise ValueError(f"screening must be at least 1 and below the group's {completions}, got {screening}")
        if not 0 <= low < high <= 1:
            raise ValueError(f"need 0 <= low < high <= 1, got {low} and {high}")
        self.screening, self.completions, self.low, self.high = screening, completions, low, high
        self.stream = UniformSampler(sample_ids, seed)
        self.screened: dict[str, int] = {}
        self.passed: list[tuple[str, int]] = []
        self.continued: set[str] = set()

    def leave_out(self, sample_ids: Iterable[str]) -> None:
        """Never draw these again, nor finish their groups."""
        super().leave_out(sample_ids)
        self.stream.leave_out(self.left_out)
        self.passed = [(sample_id, epoch) for sample_id, epoch in self.passed if sample_id not in self.left_out]

    def next(self, count: int) -> list[Draw]:
        """The rest of groups that passed, and new prompts to screen."""
        ready, self.passed = self.passed[:count], self.passed[count:]
        draws = [Draw(sample_id, epoch, self.completions - self.screening) for sample_id, epoch in ready]
        self.continued = {draw.sample_id for draw in draws}
        waiting = self.continued | {sample_id for sample_id, _ in self.passed}
        self.screened = {}
        looked_at = 0
        while len(draws) < count and looked_at < len(self.sample_ids):
            (draw,) = self.stream.next(1)
            looked_at += 1
            # One group of a prompt at a time, or its outcomes could not be told apart.
            if draw.sample_id not in waiting and draw.sample_id not in self.screened:
                self.screened[draw.sample_id] = draw.epoch
                draws.append(Draw(draw.sample_id, draw.epoch, self.screening))
        return draws

    def update(self, outcomes: Mapping[str, Sequence[bool]]) -> None:
        """Let through what was screened and is neither too easy nor too hard."""
        for sample_id, correct in outcomes.items():
            if sample_id in self.screened and self.low < float(np.mean(correct)) < self.high:
                self.passed.append((sample_id, self.screened[sample_id]))

    def keeps(self, sample_id: str, correct: Sequence[bool]) -> bool:
        """Whether the group is whole: screened, passed and continued."""
        return sample_id in self.continued and len(correct) >= self.completions

    def unfinished(self, sample_id: str) -> bool:
        """Whether it passed and waits for the rest of its group."""
        return any(waiting == sample_id for waiting, _ in self.passed)

    def metrics(self) -> dict[str, float]:
        """waiting: prompts that passed their screening and wait for the rest of their group."""
        return {"waiting": float(len(self.passed))}

    def _state(self) -> dict[str, Any]:
        return {
            "stream": self.stream.state_dict(),
            "screened": dict(self.screened),
            "passed": [list(entry) for entry in self.passed],
            "continued": sorted(self.continued),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.screened = {sample_id: int(epoch) for sample_id, epoch in state["screened"].items()}
        self.passed = [(sample_id, int(epoch)) for sample_id, epoch in state["passed"]]
        self.continued = set(state["continued"])


SAMPLERS: dict[str, type[Sampler]] = {
    "uniform": UniformSampler,
    "curriculum": CurriculumSampler,
    "prioritised": PrioritisedSampler,
    "dynamic": DynamicSampler,
    "greso": GresoSampler,
    "speed": SpeedSampler,
}
