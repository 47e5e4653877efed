"""Starting Ray and the actors of each role, and moving groups between them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.job_config import JobConfig

from plumbline.errors import InputError
from plumbline.rl.actors import LearnerWorker, RewardWorker, RolloutWorker
from plumbline.rl.batch import Group, Prompt, Sampling, TrainingBatch
from plumbline.rl.config import RunConfig
from plumbline.rl.monitoring.job import actor_namer, job_metadata, show_on_job_page
from plumbline.rl.monitoring.publish import publish_grading_queue


def start_ray(config: RunConfig) -> bool:
    """Connect to the job's or the given cluster, else start a local one. Returns whether we started it."""
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray lowers its workers' priority by 15; here the workers are the work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    metadata = job_metadata(config.name, config.folder)
    common: dict[str, Any] = {
        "job_config": JobConfig(metadata=metadata),
        "log_to_driver": True,
        "logging_level": logging.WARNING,
    }
    if address:
        ray.init(address=address, **common)
        trouble = show_on_job_page(metadata)
        if trouble:
            logging.getLogger(__name__).warning(trouble)
        return True
    # Whoever can reach a Ray cluster can run code in it. Ray asks for the token in ~/.ray/auth_token unless RAY_AUTH_MODE
    # says otherwise, which is left to the user.
    with on_loopback():
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _booked_cpus(config)),
            include_dashboard=config.ray.dashboard,
            dashboard_host="127.0.0.1",
            **common,
        )
    return True


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within the block, a cluster that is started listens on the loopback address alone.

    Ray does so by itself on systems where it forms no clusters of several machines; elsewhere it binds to every
    interface, and takes an address of 127.0.0.1 for the machine's outer one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _booked_cpus(config: RunConfig) -> int:
    """A local cluster offers at least what the roles book: they take turns, so booking more than the cores is fine."""
    booked = (
        config.rollout.workers * config.rollout.cpus_per_worker
        + config.reward.workers * config.reward.cpus_per_worker
        + config.learner.workers * config.learner.cpus
    )
    return int(-(-booked // 1))


@dataclass
class Roles:
    """Handles of a run's actors. `start` once, `begin` for every training run or evaluation."""

    config: RunConfig
    owns_ray: bool
    rollout: list[Any] = field(default_factory=list)
    reward: list[Any] = field(default_factory=list)
    learners: list[Any] = field(default_factory=list)

    @classmethod
    def start(cls, config: RunConfig, *, learner: bool = True) -> Roles:
        """Start Ray and the actors; InputError when the cluster cannot hold them before the deadline."""
        roles = cls(config, start_ray(config))
        rollout, reward, settings = config.rollout, config.reward, config.learner
        # Ray adds `options` and `remote` to a decorated class; type checkers do not see them.
        rollout_actor: Any = RolloutWorker
        reward_actor: Any = RewardWorker
        learner_actor: Any = LearnerWorker
        name = actor_namer()
        for number in range(rollout.workers):
            options: dict[str, Any] = {"num_cpus": rollout.cpus_per_worker, "num_gpus": rollout.gpus_per_worker}
            roles.rollout.append(rollout_actor.options(name=name("rollout", number), **options).remote())
        for number in range(reward.workers):
            options = {"num_cpus": reward.cpus_per_worker, "name": name("reward", number)}
            roles.reward.append(reward_actor.options(**options).remote(config))
        for number in range(settings.workers if learner else 0):
            options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "name": name("learner", number)}
            roles.learners.append(learner_actor.options(**options).remote())
        actors = [*roles.rollout, *roles.reward, *roles.learners]
        ready = [actor.__ray_ready__.remote() for actor in actors]
        done, pending = ray.wait(ready, num_returns=len(ready), timeout=config.ray.start_timeout_seconds)
        ray.get(done)
        if pending:
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU", "memory")}
            roles.close()
            raise InputError(
                f"{len(pending)} of {len(ready)} actors did not start within {config.ray.start_timeout_seconds:g} s "
                f"(free in the cluster: {free}); lower rollout.workers or *.cpus_per_worker / *.gpus_per_worker"
            )
        if learner:
            address = ray.get(roles.learners[0].address.remote())
            joining = roles._learn(
                "join", *((rank, settings.workers, address, config) for rank in range(settings.workers))
            )
            ray.get(joining)
        return roles

    def _learn(self, method: str, *arguments: tuple[Any, ...]) -> list[Any]:
        """Call a method on every learner process at once, with one tuple of arguments for all or one each; their results to come."""
        each = arguments * len(self.learners) if len(arguments) == 1 else arguments
        return [getattr(learner, method).remote(*a) for learner, a in zip(self.learners, each, strict=True)]

    def update(self, batch: TrainingBatch) -> list[Any]:
        """Start one training step of the learner; the metrics to come, the same from every process."""
        return self._learn("update", (ray.put(batch),))

    def load(self, folder: Path) -> None:
        """Learner's state from a checkpoint."""
        ray.get(self._learn("load", (str(folder.resolve()),)))

    def save(self, folder: Path) -> None:
        """Copy the learner's state and start to write it into a checkpoint."""
        ray.get(self._learn("save", (str(folder.resolve()),)))

    def written(self, *, wait: bool) -> dict[str, str] | None:
        """SHA-256 by path of what the last `save` wrote, once all is; None until then. Raises what kept it from that."""
        parts = ray.get(self._learn("written", (wait,)))
        return None if None in parts else {name: value for part in parts for name, value in part.items()}

    def begin(self, config: RunConfig) -> None:
        """Load the run's starting policy everywhere."""
        self.config = config
        ray.get([worker.begin.remote(config) for worker in [*self.learners, *self.rollout]])

    def begin_evaluation(self, config: RunConfig, policy_path: str | None) -> None:
        """Load one policy into the rollout workers alone."""
        self.config = config
        ray.get([worker.begin.remote(config, policy_path) for worker in self.rollout])

    def sync(self) -> int:
        """Learner's weights to every rollout worker; checks that they arrived whole. Returns their version."""
        published = ray.get(self._learn("publish", ()))[0]
        arrays = ray.put(published["arrays"])
        checksums = ray.get([worker.load_weights.remote(published["version"], arrays) for worker in self.rollout])
        for checksum in checksums:
            if abs(checksum - published["checksum"]) > 1e-9 * abs(published["checksum"]):
                raise RuntimeError(
                    f"weights changed on the way to a rollout worker: checksum {checksum} there, {published['checksum']} here"
                )
        return published["version"]

    def graded_groups(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Generate and grade; yields groups as they are graded, in any order. Grading runs beside generation.

        Raises TimeoutError after rollout.timeout_seconds.
        """
        deadline = time.monotonic() + self.config.rollout.timeout_seconds
        shares = [prompts[number :: len(self.rollout)] for number in range(len(self.rollout))]
        streams = [
            worker.generate.remote(share, completions, sampling)
            for worker, share in zip(self.rollout, shares, strict=True)
            if share
        ]
        grading: list[Any] = []
        sent = received = 0
        while received < len(prompts):
            left = deadline - time.monotonic()
            ready, _ = ray.wait([*streams, *grading], num_returns=1, timeout=max(left, 0))
            if not ready:
                raise TimeoutError(
                    f"{len(prompts) - received} of {len(prompts)} groups were not back after "
                    f"rollout.timeout_seconds = {self.config.rollout.timeout_seconds:g}"
                )
            item: Any
            for item in ready:
                if item in grading:
                    grading.remove(item)
                    received += 1
                    publish_grading_queue(self.config.name, len(grading))
                    yield ray.get(item)
                    continue
                try:
                    group = next(item)
                except StopIteration:
                    streams.remove(item)
                    continue
                grading.append(self.reward[sent % len(self.reward)].grade.remote(group))
                sent += 1
                publish_grading_queue(self.config.name, len(grading))

    def close(self) -> None:
        """Stop grading processes and, if this run started it, Ray."""
        if not ray.is_initialized():
            return
        closing = [worker.close.remote() for worker in self.reward]
        ray.wait(closing, num_returns=len(closing), timeout=10) if closing else None
        for actor in [*self.rollout, *self.reward, *self.learners]:
            ray.kill(actor)
        if self.owns_ray:
            ray.shutdown()

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
