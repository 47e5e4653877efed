"""The actors of each role: started with their resources, called all at once, and replaced where that is possible."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from plumbline.errors import InputError, RunStopped
from plumbline.rl.actors import LearnerWorker, RewardWorker, RolloutWorker
from plumbline.rl.batch import Group, Prompt, Sampling, TrainingBatch
from plumbline.rl.clock import WorkClock
from plumbline.rl.config import RunConfig
from plumbline.rl.connect import start_ray
from plumbline.rl.exchange import Exchange
from plumbline.rl.faults import Place, RoleFailed, gather
from plumbline.rl.monitoring.job import actor_namer
from plumbline.rl.placement import Placement
from plumbline.rl.pool import Pool


@dataclass
class Roles:
    """Handles of a run's actors. `start` once, `begin` for every training run or evaluation.

    A rollout or reward worker that dies is replaced and its prompts are asked again (exchange.py); a learner that dies
    ends the run, which goes on from its last checkpoint. Every wait has a deadline; see faults.gather for what it raises.
    """

    config: RunConfig
    owns_ray: bool
    placement: Placement
    rollout: Pool = field(init=False)
    reward: Pool = field(init=False)
    learners: Pool = field(init=False)
    # What a rollout worker holds: the policy it began with, then the weights that the learner published last.
    begun: tuple[RunConfig, str | None] | None = None
    published: dict[str, Any] | None = None
    # GPUs that an actor sees, its own first, by its name.
    cards: dict[str, list[str]] = field(default_factory=dict)
    clock: WorkClock = field(init=False)
    # The engines, see rollout.sleep_in_update.
    asleep: bool = False
    # What the last `sync` took.
    sync_seconds: float = 0.0
    # Set: exchanges under way are to end.
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, config: RunConfig, *, learner: bool = True) -> Roles:
        """Start Ray and the actors; InputError when the cluster cannot hold them before the deadline."""
        owns_ray = start_ray(config)
        try:
            placement = Placement.book(config, config.ray.start_timeout_seconds) if learner else Placement()
        except BaseException:
            if owns_ray:
                ray.shutdown()
            raise
        roles = cls(config, owns_ray, placement)
        rollout, reward, settings = config.rollout, config.reward, config.learner
        # Ray adds `options` and `remote` to a decorated class; type checkers do not see them.
        rollout_actor: Any = RolloutWorker
        reward_actor: Any = RewardWorker
        learner_actor: Any = LearnerWorker
        name = actor_namer()

        def named(role: str, number: int, before: int) -> str:
            return name(role, number) + (f"-again-{before}" if before else "")

        def make_rollout(number: int, before: int) -> Any:
            options = {"num_cpus": rollout.cpus_per_worker, "num_gpus": rollout.gpus_per_worker}
            options |= placement.rollout(number)
            return rollout_actor.options(name=named("rollout", number, before), **options).remote()

        def make_reward(number: int, before: int) -> Any:
            options = {"num_cpus": reward.cpus_per_worker, "name": named("reward", number, before)}
            return reward_actor.options(**options).remote(config)

        def make_learner(number: int, before: int) -> Any:
            options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "name": named("learner", number, before)}
            return learner_actor.options(**options, **placement.learner(number)).remote()

        limit, most = roles._starting(), config.ray.replacements_per_step
        roles.rollout = Pool("rollout", rollout.workers, make_rollout, limit, most)
        roles.reward = Pool("reward", reward.workers, make_reward, limit, most)
        roles.learners = Pool("learner", settings.workers if learner else 0, make_learner, limit)
        roles.rollout.prepare = roles._prepare
        pools = (roles.rollout, roles.reward, roles.learners)
        roles.clock = WorkClock({pool.role: len(pool) for pool in pools})
        try:
            roles._await_places()
            if learner:
                places = roles.learners.places
                doing = "the learner's processes meeting"
                (address,) = gather([(places[0], roles.learners[0].address.remote())], limit, doing)
                ranks = [(rank, settings.workers, address, config) for rank in range(settings.workers)]
                gather(roles._learn("join", *ranks), limit, doing)
        except BaseException:
            roles.close()
            raise
        return roles

    def _starting(self) -> tuple[str, float]:
        return "ray.start_timeout_seconds", self.config.ray.start_timeout_seconds

    def _transfer(self) -> tuple[str, float]:
        return "ray.transfer_timeout_seconds", self.config.ray.transfer_timeout_seconds

    def _await_places(self) -> None:
        """Until every actor is up."""
        pools = (self.rollout, self.reward, self.learners)
        calls = [call for pool in pools for call in pool.calls("place")]
        seconds = self.config.ray.start_timeout_seconds
        _, pending = ray.wait([ref for _, ref in calls], num_returns=len(calls), timeout=seconds)
        if pending:
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU", "memory")}
            raise InputError(
                f"{len(pending)} of {len(calls)} actors did not start within {seconds:g} s "
                f"(free in the cluster: {free}); lower rollout.workers or *.cpus_per_worker / *.gpus_per_worker"
            )
        places = iter(gather(calls, self._starting(), "the workers' start"))
        for pool in pools:
            pool.places = [next(places) for _ in pool]

    def _learn(self, method: str, *arguments: tuple[Any, ...]) -> list[tuple[Place, Any]]:
        """Call a method on every learner process at once, with one tuple of arguments for all or one each; for `gather`."""
        each = arguments * len(self.learners) if len(arguments) == 1 else arguments
        return [
            (place, getattr(learner, method).remote(*a))
            for place, learner, a in zip(self.learners.places, self.learners, each, strict=True)
        ]

    def update(self, batch: TrainingBatch) -> Callable[[], dict[str, float]]:
        """Start one training step of the learner; call what is returned for its metrics."""
        limit = ("learner.update_timeout_seconds", self.config.learner.update_timeout_seconds)
        self._rest(asleep=True)
        self._learners_work(self.clock.begin)
        calls = self._learn("update", (ray.put(batch),))

        def metrics() -> dict[str, float]:
            try:
                return gather(calls, limit, "the learner's update")[0]
            finally:
                self._learners_work(self.clock.end)

        return metrics

    def _learners_work(self, change: Callable[[str, int], None]) -> None:
        for number in range(len(self.learners)):
            change("learner", number)

    def load(self, folder: Path) -> None:
        """Learner's state from a checkpoint."""
        gather(self._learn("load", (str(folder.resolve()),)), self._transfer(), f"loading {folder}")

    def save(self, folder: Path) -> None:
        """Copy the learner's state and start to write it into a checkpoint."""
        gather(self._learn("save", (str(folder.resolve()),)), self._transfer(), f"copying the state for {folder}")

    def written(self, *, wait: bool) -> dict[str, str] | None:
        """SHA-256 by path of what the last `save` wrote, once all is; None until then. Raises what kept it from that."""
        parts = gather(self._learn("written", (wait,)), self._transfer(), "writing the checkpoint")
        return None if None in parts else {name: value for part in parts for name, value in part.items()}

    def begin(self, config: RunConfig) -> None:
        """Load the run's starting policy everywhere."""
        self.config, self.begun, self.published, self.asleep = config, (config, None), None, False
        engines = zip(self.rollout, self.rollout.places, strict=True)
        calls = self._learn("begin", (config,)) + [
            (p, h.begin.remote(config, None, self._gpus_near(p))) for h, p in engines
        ]
        cards = gather(calls, self._transfer(), f"loading {config.policy.path}")
        self.cards = {place.name: seen for (place, _), seen in zip(calls, cards, strict=True)}

    def _gpus_near(self, place: Place) -> tuple[str, ...]:
        """Of the first learner on this machine."""
        return next((learner.gpus for learner in self.learners.places if learner.node == place.node), ())

    def begin_evaluation(self, config: RunConfig, policy_path: str | None) -> None:
        """Load one policy into the rollout workers alone."""
        self.config, self.begun, self.published, self.asleep = config, (config, policy_path), None, False
        path = policy_path or config.policy.path
        gather(self.rollout.calls("begin", config, policy_path), self._transfer(), f"loading {path}")

    def sync(self) -> int:
        """Learner's weights to every rollout worker; checks that they arrived whole. Returns their version."""
        began = time.monotonic()
        self._rest(asleep=False)
        self._learners_work(self.clock.begin)
        try:
            near = [self._learner_near(place) for place in self.rollout.places]
            asked = [(number in near, number == 0 and None in near) for number in range(len(self.learners))]
            calls = self._learn("publish", *asked)
            published = gather(calls, self._transfer(), "publishing the learner's weights")[0]
        finally:
            self._learners_work(self.clock.end)
        with self.rollout.lock:
            self.published = published
            calls = [
                self._give_weights(handle, place)
                for handle, place in zip(self.rollout, self.rollout.places, strict=True)
            ]
            for number, (handle, call) in enumerate(zip(list(self.rollout), calls, strict=True)):
                try:
                    self._check_weights(call)
                except RoleFailed as error:
                    self.rollout.replace(number, handle, str(error))
        self.sync_seconds = time.monotonic() - began
        return published["version"]

    def _rest(self, *, asleep: bool) -> None:
        """Engines to sleep or awake, where rollout.sleep_in_update says so. In the place of one that fails another is asked."""
        if asleep == self.asleep or not self.config.rollout.sleep_in_update:
            return
        doing = "the engines' falling asleep" if asleep else "the engines' waking"
        self.rollout.each("rest", [asleep] * len(self.rollout), self._transfer(), doing)
        self.asleep = asleep

    def _give_weights(self, handle: Any, place: Place) -> tuple[Place, Any]:
        assert self.published is not None
        weights: Any
        near = self._learner_near(place)
        if near is not None:
            weights = self.learners[near].ticket.remote()
        else:
            weights = self.published["arrays"] = self.published["arrays"] or self.learners[0].arrays.remote()
        return place, handle.load_weights.remote(self.published["version"], weights)

    def _learner_near(self, place: Place) -> int | None:
        """Number of the learner on this rollout worker's GPU, or else on another that it sees."""
        learners = [self.cards.get(learner.name) for learner in self.learners.places]
        own = [cards[0] if cards else None for cards in learners]
        return next((own.index(card) for card in self.cards.get(place.name, ()) if card in own), None)

    def _check_weights(self, call: tuple[Place, Any]) -> None:
        assert self.published is not None
        (there,) = gather([call], self._transfer(), f"weights for {call[0].name}")
        here = self.published["checksum"]
        if abs(there - here) > 1e-9 * abs(here):
            raise RunStopped(f"weights changed on the way to {call[0].name}: checksum {there} there, {here} here")

    def _prepare(self, handle: Any, place: Place) -> None:
        """Bring a new rollout worker to where the others are."""
        if self.begun is not None:
            begin = handle.begin.remote(*self.begun, self._gpus_near(place))
            (self.cards[place.name],) = gather([(place, begin)], self._transfer(), "loading the policy")
        if self.published is not None:
            self._check_weights(self._give_weights(handle, place))

    @property
    def replaced(self) -> int:
        """Rollout and reward workers that were replaced since the start."""
        return self.rollout.replaced + self.reward.replaced

    def graded_groups(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Generate and grade; see Exchange.run."""
        exchange = Exchange(self.config, self.rollout, self.reward, self.clock, self.stop.is_set)
        return exchange.run(prompts, completions, sampling)

    def close(self) -> None:
        """Stop grading processes and, if this run started it, Ray."""
        if not ray.is_initialized():
            return
        closing = [worker.close.remote() for worker in self.reward]
        ray.wait(closing, num_returns=len(closing), timeout=10) if closing else None
        for pool in (self.rollout, self.reward, self.learners):
            pool.close()
        self.placement.close()
        if self.owns_ray:
            ray.shutdown()

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
