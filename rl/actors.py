"""The Ray actors, one a role. Each is a thin shell around an object that does not know Ray."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray

from plumbline.rewards.verdict import Verdict
from plumbline.rl.batch import Group, Prompt, Sampling, TrainingBatch
from plumbline.rl.config import RunConfig
from plumbline.rl.faults import Place, own_place
from plumbline.rl.monitoring.publish import actor_name, watch_grading, watch_rollout, watch_update

if TYPE_CHECKING:
    from plumbline.rl.handover import Ticket
    from plumbline.rl.rollout import CarryingEngine


def _set_up(threads: int | None) -> None:
    """Threads, and no progress bars of libraries in the driver's output.

    Ray sets OMP_NUM_THREADS from the booked CPU share; roles that take turns may use every core.
    """
    import torch
    from transformers.utils import logging

    from plumbline.rl.device import usable_cpus

    torch.set_num_threads(threads or usable_cpus())
    logging.disable_progress_bar()


class _Actor:
    """What actors of every role have."""

    # Ray puts it in front of each line that the actor logs.
    def __repr__(self) -> str:
        return actor_name()

    def place(self) -> Place:
        """Where it runs, once it does."""
        return own_place()


@ray.remote
class RolloutWorker(_Actor):
    """Owns a rollout engine."""

    def begin(self, config: RunConfig, policy_path: str | None = None, gpus: tuple[str, ...] = ()) -> list[str]:
        """Load the starting policy of a run (or any other to evaluate).

        Args:
            gpus: of this machine's learners, whose weights it may read there.

        Returns:
            names of the GPUs that it sees, its own first.
        """
        from plumbline.rl.device import pick_device
        from plumbline.rl.handover import cards, see_also
        from plumbline.rl.rollout import make_engine
        from plumbline.rl.text import Codec

        see_also(gpus)
        _set_up(config.rollout.threads_per_worker)
        path = policy_path or config.policy.path
        device = pick_device(config.policy.device)
        codec = Codec(path, overrides=config.prompt)
        attention = config.policy.attention if policy_path is None else None
        # An earlier run's weights and cache must be gone before the next are made; a generator holds them too.
        self.__dict__.pop("under_way", None)
        self.__dict__.pop("engine", None)
        self.engine = make_engine(config, path, attention, codec, device)
        self.asleep = False
        return list(cards(device))

    def load_weights(self, version: int, weights: dict[str, np.ndarray] | Ticket) -> float:
        """Take the learner's weights; returns their checksum as they stand here."""
        from plumbline.rl.handover import from_arrays

        self.engine.load_weights(version, from_arrays(weights) if isinstance(weights, dict) else weights.tensors())
        return self.engine.checksum()

    def rest(self, asleep: bool) -> None:
        """Leave the GPU to the learner, or take it back."""
        if asleep and not self.asleep:
            self.__dict__.pop("under_way", None)  # a finished generator may hold the engine's memory
            self.engine.sleep()
        elif self.asleep and not asleep:
            self.engine.wake()
        self.asleep = asleep

    @ray.method(num_returns="streaming")
    def generate(
        self, prompts: list[Prompt], completions: int, sampling: Sampling, slice_seconds: float | None = None
    ) -> Iterator[Group]:
        """Groups as they are finished: all of them, or those of about slice_seconds. `go_on` then goes on, and calls
        that came in meanwhile have been answered: new weights reach completions under way."""
        parts: Iterator[Group | None]
        if slice_seconds is None:
            parts = self.engine.generate(prompts, completions, sampling)
        else:
            parts = cast("CarryingEngine", self.engine).generate_in_parts(prompts, completions, sampling)
        self.under_way = watch_rollout(parts, len(prompts))
        yield from self._slice(slice_seconds)

    @ray.method(num_returns="streaming")
    def go_on(self, slice_seconds: float) -> Iterator[Group]:
        """More groups of the last `generate`."""
        yield from self._slice(slice_seconds)

    def _slice(self, seconds: float | None) -> Iterator[Group]:
        end = math.inf if seconds is None else time.monotonic() + seconds
        for group in self.under_way:
            if group is not None:
                yield group
            elif time.monotonic() > end:
                return


@ray.remote
class RewardWorker(_Actor):
    """Grades finished groups in killable processes while other groups still generate."""

    def __init__(self, config: RunConfig) -> None:
        from plumbline.rewards.workers import Grader
        from plumbline.rl.grading import load_shaping

        settings = config.reward
        self.grader = Grader(settings.processes_per_worker, settings.timeout_seconds, settings.memory_gib)
        self.shaping = load_shaping(config)
        self.second = Grader(settings.processes_per_worker, settings.timeout_seconds, settings.memory_gib, second=True)
        # They come up while the policy loads, so that no answer waits for them.
        self.grader.start()
        if settings.checking.share > 0:
            self.second.start()

    def grade(self, group: Group) -> Group:
        from plumbline.rl.grading import grade_group

        began = time.monotonic()
        return watch_grading(grade_group(group, self.grader, self.shaping), began)

    def second_opinion(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """What the second checker says of (answer, gold) pairs."""
        return self.second.compare_many(pairs)

    def close(self) -> None:
        self.grader.close()
        self.second.close()


@ray.remote
class LearnerWorker(_Actor):
    """One of the learner's processes. Every method is called on all of them at once."""

    def address(self) -> str:
        """host:port where the learner's processes can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, rank: int, size: int, address: str, config: RunConfig) -> None:
        """Meet the other processes; raises when they do not come within ray.start_timeout_seconds."""
        from plumbline.rl.device import pick_device
        from plumbline.rl.distributed import Ranks

        self.device = pick_device(config.policy.device)
        self.ranks = Ranks.join(rank, size, address, self.device, config.ray.start_timeout_seconds)

    def begin(self, config: RunConfig) -> list[str]:
        """Load the starting policy with a fresh optimizer. Returns names of the GPUs that it sees, its own first."""
        import torch

        from plumbline.rl.handover import Shelf, cards
        from plumbline.rl.learner import Learner
        from plumbline.rl.text import Codec

        _set_up(config.learner.threads)
        self.shares_gpu = config.learner.gpus < 1  # as far as Ray knows
        self.learner = Learner(config, self.device, self.ranks)
        self.codec = Codec(config.policy.path, overrides=config.prompt)
        self.shelf = Shelf(torch.bfloat16 if config.rollout.precision == "bfloat16" else torch.float32)
        return list(cards(self.device))

    def load(self, folder: str) -> None:
        from plumbline.rl import learner_state

        learner_state.load(self.learner, Path(folder))

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        """The learner's metrics, and the seconds they took in this process."""
        import torch

        began = time.monotonic()
        metrics = self.learner.update(batch)
        watch_update(began)
        if self.shares_gpu:
            # Microbatches of ever new shapes leave gaps between blocks, and the allocator would grow at the engine's expense.
            torch.cuda.empty_cache()
        return metrics | {"time/update_seconds": time.monotonic() - began}

    def publish(self, mapped: bool = False, through_host: bool = False) -> dict[str, Any]:
        """Set the present weights out for the engines. Returns {version, checksum, arrays}, of the first process alone.

        Args:
            mapped: an engine maps this process's copy, through a `ticket`. The first process makes one in any case: the
                checksum is taken from what the engines read.
            through_host: `arrays` refers to them in the object store, where all other engines read them; else it is None.
        """
        from plumbline.rl import learner_state
        from plumbline.rl.rollout import absolute_sum

        weights = learner_state.each_policy_weight(self.learner, self.shelf.dtype)
        if self.ranks.rank and not mapped:
            for _ in weights:  # the shards are gathered by all processes together
                pass
            return {}
        self.shelf.put(weights, learner_state.policy_shapes(self.learner))
        if self.ranks.rank:
            return {}
        checksum = absolute_sum(self.shelf.tensors().values())
        arrays = ray.put(self.shelf.arrays()) if through_host else None
        return {"version": self.learner.version, "checksum": checksum, "arrays": arrays}

    def arrays(self) -> dict[str, np.ndarray]:
        """The published weights, for an engine elsewhere that `publish` did not know of."""
        return self.shelf.arrays()

    def ticket(self) -> Ticket:
        """The published weights, for one engine on this machine."""
        return self.shelf.ticket()

    def save(self, folder: str) -> None:
        """Copy the state and start to write folder/policy, folder/learner and folder/learner.pt; see learner_state."""
        from plumbline.rl import learner_state

        if self.ranks.rank == 0:
            (Path(folder) / "policy").mkdir(parents=True, exist_ok=True)
            self.codec.save(Path(folder) / "policy")
        self.saving = learner_state.Saving(self.learner, Path(folder))

    def written(self, wait: bool) -> dict[str, str] | None:
        """Of the last `save`: see learner_state.Saving.written."""
        return self.saving.written(wait=wait)
