"""Online samplers: which prompts the next training step sees. Their state is saved and resumed exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One prompt of a step: its id, and the pass over the set it belongs to (from 0)."""

    sample_id: str
    epoch: int


class UniformSampler:
    """Every sample once an epoch, in a new seeded order each epoch; a step may span two epochs.

    Args:
        sample_ids: unique ids.
        seed: of the orders.

    Raises:
        ValueError: no ids, or one twice.
    """

    def __init__(self, sample_ids: Sequence[str], seed: int) -> None:
        self.sample_ids = list(sample_ids)
        if not self.sample_ids:
            raise ValueError("a sampler needs at least one sample")
        if len(set(self.sample_ids)) != len(self.sample_ids):
            raise ValueError("sample ids must be unique")
        self.seed = seed
        self.drawn = 0

    def next(self, count: int) -> list[Draw]:
        """The next `count` prompts."""
        draws = []
        size = len(self.sample_ids)
        order: np.ndarray | None = None
        for position in range(self.drawn, self.drawn + count):
            epoch, place = divmod(position, size)
            if order is None or place == 0:
                order = np.random.default_rng([self.seed, epoch]).permutation(size)
            draws.append(Draw(self.sample_ids[order[place]], epoch))
        self.drawn += count
        return draws

    def update(self, outcomes: Mapping[str, Sequence[bool]]) -> None:
        """Correctness of each rollout of the step's samples. Uniform sampling does not look."""

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the sampler's state has seed {state['seed']}, not {self.seed}")
        self.drawn = int(state["drawn"])
