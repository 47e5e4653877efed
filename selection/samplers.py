"""Online samplers: which prompts the next training step sees. Their state is saved and resumed exactly.

All share one small protocol, and a training step is

    draws = sampler.next(count)                      # prompts to roll out now
    outcomes = roll out and grade draws              # sample id -> correctness of each rollout
    sampler.update(outcomes)
    batch += [group for group in outcomes if sampler.keeps(group)]     # and again until the batch is full

`collect` is that loop. Uniform, curriculum and prioritised samplers keep every group, so one round fills the batch;
those in dynamic_samplers.py drop groups that teach nothing, or stop a prompt's rollouts early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One prompt to roll out: its id, the pass over the set it belongs to (from 0), and how often to roll it out now.

    `rollouts` 0 is a whole group, of the size the run is configured with.
    """

    sample_id: str
    epoch: int
    rollouts: int = 0


class Sampler:
    """What every sampler has.

    Args:
        sample_ids: unique ids.
        seed: of every random choice.

    Raises:
        ValueError: no ids, or one twice.
    """

    def __init__(self, sample_ids: Sequence[str], seed: int) -> None:
        self.sample_ids = list(sample_ids)
        if not self.sample_ids:
            raise ValueError("a sampler needs at least one sample")
        self.place = {sample_id: number for number, sample_id in enumerate(self.sample_ids)}
        if len(self.place) != len(self.sample_ids):
            raise ValueError("sample ids must be unique")
        self.seed = seed
        self.left_out: set[str] = set()

    def leave_out(self, sample_ids: Iterable[str]) -> None:
        """Never draw these again (quarantine). Raises ValueError if nothing would be left."""
        self.left_out |= set(sample_ids) & set(self.place)
        if len(self.left_out) == len(self.sample_ids):
            raise ValueError(f"all {len(self.sample_ids)} samples would be left out")

    def next(self, count: int) -> list[Draw]:
        """The next `count` prompts."""
        raise NotImplementedError

    def update(self, outcomes: Mapping[str, Sequence[bool]]) -> None:
        """Take in the correctness of each rollout just graded, by sample id."""

    def keeps(self, sample_id: str, correct: Sequence[bool]) -> bool:
        """Whether the group, all rollouts of it so far, goes into the batch."""
        return True

    def unfinished(self, sample_id: str) -> bool:
        """Whether the sample's group was begun and will be asked for again."""
        return False

    def metrics(self) -> dict[str, float]:
        """What there is to watch while it works."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later draws, in plain types."""
        return {
            "kind": type(self).__name__,
            "seed": self.seed,
            "samples": len(self.sample_ids),
            "left_out": sorted(self.left_out),
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where state_dict was taken. Raises ValueError for another kind, seed or number of samples."""
        own = {"kind": type(self).__name__, "seed": self.seed, "samples": len(self.sample_ids)}
        for name, value in own.items():
            if state.get(name) != value:
                raise ValueError(f"the sampler's saved state has {name} {state.get(name)!r}, this one has {value!r}")
        self.left_out = set(state.get("left_out", ()))
        self._load(state)

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError


class UniformSampler(Sampler):
    """Every sample once an epoch, in a new seeded order each epoch; a step may span two epochs."""

    def __init__(self, sample_ids: Sequence[str], seed: int) -> None:
        super().__init__(sample_ids, seed)
        self.drawn = 0

    def next(self, count: int) -> list[Draw]:
        """The next `count` prompts."""
        draws: list[Draw] = []
        size = len(self.sample_ids)
        order: np.ndarray | None = None
        while len(draws) < count:
            epoch, place = divmod(self.drawn, size)
            if order is None or place == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(size)
            self.drawn += 1
            sample_id = self.sample_ids[order[place]]
            if sample_id not in self.left_out:
                draws.append(Draw(sample_id, epoch))
        return draws

    def _state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.drawn = int(state["drawn"])


class _Weighted(Sampler):
    """Samplers that choose anew each step; a draw's epoch is how often that sample was drawn before."""

    def __init__(self, sample_ids: Sequence[str], seed: int) -> None:
        super().__init__(sample_ids, seed)
        self.visits = np.zeros(len(self.sample_ids), dtype=np.int64)
        self.steps = 0

    def next(self, count: int) -> list[Draw]:
        """The next `count` prompts: different ones, as long as there are enough."""
        draws: list[Draw] = []
        rng = np.random.default_rng([self.seed, self.steps])
        self.steps += 1
        while len(draws) < count:
            wanted = min(count - len(draws), len(self.sample_ids) - len(self.left_out))
            for place in self._choose(wanted, rng):
                draws.append(Draw(self.sample_ids[place], int(self.visits[place])))
                self.visits[place] += 1
        return draws

    def _choose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Places of at least one and at most `count` samples, all different, none of them left out."""
        raise NotImplementedError

    def _allowed(self, places: np.ndarray) -> np.ndarray:
        """Those of these places that are not left out."""
        if not self.left_out:
            return places
        return places[[self.sample_ids[place] not in self.left_out for place in places]]

    def _state(self) -> dict[str, Any]:
        return {"visits": self.visits.tolist(), "steps": self.steps}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.visits = np.array(state["visits"], dtype=np.int64)
        self.steps = int(state["steps"])


class CurriculumSampler(_Weighted):
    """Easy first: draws from the easiest share of the samples, which grows to all of them (arXiv 1903.09848's
    competence).

    Within the share those drawn least often come first, in random order.

    Args:
        difficulty: of each sample, any numbers; a level, or one minus a pass rate.
        start: share of the samples open at first.
        passes: the whole set is open after so many times its size in draws.

    Raises:
        ValueError: a sample without difficulty, or a share outside (0, 1].
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        seed: int,
        *,
        difficulty: Mapping[str, float],
        start: float = 0.2,
        passes: float = 2.0,
    ) -> None:
        super().__init__(sample_ids, seed)
        missing = [sample_id for sample_id in self.sample_ids if sample_id not in difficulty]
        if missing:
            raise ValueError(f"{len(missing)} samples have no difficulty, the first is {missing[0]!r}")
        if not 0 < start <= 1 or passes <= 0:
            raise ValueError(f"start must be in (0, 1] and passes over 0, got {start} and {passes}")
        levels = np.array([difficulty[sample_id] for sample_id in self.sample_ids], dtype=float)
        # Samples of one level open in an order of their own, not in that of the file.
        ties = np.random.default_rng([self.seed, 0xD1FF]).random(len(levels))
        self.easiest_first = np.lexsort((ties, levels))
        self.start, self.passes = start, passes

    def open_count(self) -> int:
        """How many of the easiest samples are open now."""
        progress = self.visits.sum() / (self.passes * len(self.sample_ids))
        return max(1, round(min(1.0, self.start + (1 - self.start) * progress) * len(self.sample_ids)))

    def metrics(self) -> dict[str, float]:
        """open_share: of the samples, the easiest first."""
        return {"open_share": self.open_count() / len(self.sample_ids)}

    def _choose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        pool = self._allowed(self.easiest_first)[: self.open_count()]
        return pool[np.lexsort((rng.random(len(pool)), self.visits[pool]))][:count]


class PrioritisedSampler(_Weighted):
    """In proportion to 1 - success rate (Kimi k1.5, arXiv 2501.12599).

    A sample not tried yet counts as never solved, so the whole set is seen before anything is preferred. Solved
    samples have weight 0 and are drawn only when nothing else is left.

    Args:
        memory: weight of the past in the success rate when a new group comes in; 0 believes the last group alone.
    """

    def __init__(self, sample_ids: Sequence[str], seed: int, *, memory: float = 0.5) -> None:
        super().__init__(sample_ids, seed)
        if not 0 <= memory < 1:
            raise ValueError(f"memory must be in [0, 1), got {memory}")
        self.memory = memory
        self.success = np.full(len(self.sample_ids), np.nan)

    def update(self, outcomes: Mapping[str, Sequence[bool]]) -> None:
        """Move the success rates."""
        for sample_id, correct in outcomes.items():
            place, rate = self.place[sample_id], float(np.mean(correct))
            past = self.success[place]
            self.success[place] = rate if np.isnan(past) else self.memory * past + (1 - self.memory) * rate

    def metrics(self) -> dict[str, float]:
        """always_right: samples whose success rate is 1; tried: those drawn at least once."""
        return {"always_right": float((self.success == 1).sum()), "tried": float((~np.isnan(self.success)).sum())}

    def _choose(self, count: int, rng: np.random.Generator) -> np.ndarray:
        weight = 1 - np.nan_to_num(self.success)
        # Efraimidis and Spirakis: the largest of log(u) / w draws in proportion to w without replacement.
        draw = np.log(rng.random(len(weight)))
        key = np.divide(draw, weight, out=np.full(len(weight), -np.inf), where=weight > 0)
        return self._allowed(np.lexsort((draw, key))[::-1])[:count]

    def _state(self) -> dict[str, Any]:
        known = [None if np.isnan(rate) else float(rate) for rate in self.success]
        return {**super()._state(), "success": known}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.success = np.array([np.nan if rate is None else rate for rate in state["success"]], dtype=float)


@dataclass
class Collected:
    """A batch and what it cost.

    Attributes:
        groups: (draw, correctness of its rollouts) of the groups kept.
        rollouts: completions generated in all, dropped ones included.
        rounds: of next / roll out / update.
        pending: groups begun and not finished, by (sample id, epoch); hand them to the next `collect`.
    """

    groups: list[tuple[Draw, list[bool]]] = field(default_factory=list)
    rollouts: int = 0
    rounds: int = 0
    pending: dict[tuple[str, int], list[bool]] = field(default_factory=dict)


def collect(
    sampler: Sampler,
    count: int,
    completions: int,
    roll_out: Callable[[list[tuple[Draw, int]]], list[list[bool]]],
    *,
    pending: Mapping[tuple[str, int], list[bool]] | None = None,
    max_rounds: int = 10,
) -> Collected:
    """Fill a batch with `count` groups.

    Args:
        sampler: whose next, update and keeps decide.
        count: groups wanted; fewer come back after max_rounds.
        completions: size of a whole group.
        roll_out: (draw, number of completions) -> correctness of each.
        pending: of the step before; a sampler that screens may have let prompts through that did not fit its batch.
        max_rounds: a set of which nothing is learnable would go on for ever.
    """
    result = Collected()
    so_far = dict(pending or {})
    while len(result.groups) < count and result.rounds < max_rounds:
        draws = sampler.next(count - len(result.groups))
        asked = [(draw, draw.rollouts or completions) for draw in draws]
        graded = roll_out(asked)
        result.rounds += 1
        result.rollouts += sum(number for _, number in asked)
        sampler.update({draw.sample_id: correct for draw, correct in zip(draws, graded, strict=True)})
        for draw, correct in zip(draws, graded, strict=True):
            key = (draw.sample_id, draw.epoch)
            group = so_far.pop(key, []) + list(correct)
            if sampler.keeps(draw.sample_id, group):
                result.groups.append((draw, group))
            elif draw.rollouts:
                so_far[key] = group
    result.pending = {key: group for key, group in so_far.items() if sampler.unfinished(key[0])}
    return result
