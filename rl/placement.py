"""Which roles share a GPU, and Ray's placement groups, which keep them together.

Left to itself Ray fills one GPU with fractions before it takes the next, whatever the roles: with halves for two learners
and two rollout workers, both learners could land on one GPU, where NCCL refuses them, and both engines on the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from plumbline.errors import InputError
from plumbline.rl.config import RunConfig


def fit_together(config: RunConfig) -> bool:
    """Whether a learner and a rollout worker share a GPU."""
    engine, learner = config.rollout.gpus_per_worker, config.learner.gpus
    return engine > 0 and learner > 0 and engine + learner <= 1


def shared_cards(config: RunConfig) -> list[dict[str, float]]:
    """What to book on each GPU that a run shares between roles; empty if it shares none.

    GPU i takes learner i and, if both fit, rollout worker i. Where there are several, each is booked whole: no other
    fraction may push two of them onto one.
    """
    rollout, learner = config.rollout, config.learner
    both, together = rollout.gpus_per_worker + learner.gpus, fit_together(config)
    if not together and not (0 < learner.gpus < 1 and learner.workers > 1):
        return []
    engines = rollout.workers if together else 0
    count = max(learner.workers, engines)
    booked = []
    for number in range(count):
        cpus = learner.cpus * (number < learner.workers) + rollout.cpus_per_worker * (number < engines)
        booked.append({"GPU": 1.0 if count > 1 else both if together else learner.gpus, "CPU": cpus})
    return booked


@dataclass
class Placement:
    """Where the actors of a run are started."""

    group: PlacementGroup | None = None
    engines: bool = False  # they share GPUs with learners

    @classmethod
    def book(cls, config: RunConfig, seconds: float) -> Placement:
        """Book the GPUs that roles share; InputError when the cluster has not got them within so long."""
        bundles = shared_cards(config)
        if not bundles:
            return cls()
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(seconds):
            remove_placement_group(group)
            free = {name: value for name, value in ray.available_resources().items() if name in ("CPU", "GPU")}
            raise InputError(
                f"the cluster did not have {len(bundles)} x {bundles[0]} for learners and rollout workers within "
                f"{seconds:g} s (free: {free}); lower learner.workers, rollout.workers or their shares of GPUs and CPUs"
            )
        return cls(group, fit_together(config))

    def learner(self, number: int) -> dict[str, Any]:
        """Options of a learner's actor."""
        return self._options(number)

    def rollout(self, number: int) -> dict[str, Any]:
        """Options of a rollout worker's actor."""
        return self._options(number) if self.engines else {}

    def _options(self, number: int) -> dict[str, Any]:
        if self.group is None:
            return {}
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=number)
        }

    def close(self) -> None:
        """Give the GPUs back."""
        if self.group is not None:
            remove_placement_group(self.group)
