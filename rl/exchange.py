"""Prompts to rollout workers, their groups to reward workers, and both to others when a worker dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from plumbline.rl.batch import Group, Prompt, Sampling
from plumbline.rl.clock import WorkClock
from plumbline.rl.config import RunConfig
from plumbline.rl.faults import DeadlinePassed, RoleFailed, tell, user_error
from plumbline.rl.monitoring.publish import publish_grading_queue
from plumbline.rl.pool import Pool

# Overdue groups, and the end of the run, are looked for at least so often.
LOOK_SECONDS = 0.5
# In a run whose rollout goes on while the learner learns, new weights wait for a worker at most about so long.
SLICE_SECONDS = 0.1
# A group that so many reward workers died of, or hung on, is not tried again.
MOST_LOSSES = 2


@dataclass
class _Share:
    """Prompts of one rollout worker, by index, whose groups it has not given yet."""

    number: int
    handle: Any
    prompts: dict[int, Prompt]


@dataclass
class _Grading:
    """A group at a reward worker. A worker grades in the order it was sent to, so its first is the one under way."""

    group: Group
    number: int
    handle: Any
    losses: int = 0


class Interrupted(Exception):
    """The run ended while the exchange was under way."""


@dataclass
class Exchange:
    """One call of graded_groups.

    Every prompt comes back as one group exactly: whatever a dead worker had not given is asked of another, and what it
    had given is not asked again. The draws of a prompt hang on the prompt alone, so the native engine's completions are
    those that the dead worker would have given.

    Args:
        config: the run's.
        rollout, reward: the workers.
        clock: told which of them have work.
        stopped: looked at now and then; True ends the exchange.
    """

    config: RunConfig
    rollout: Pool
    reward: Pool
    clock: WorkClock
    stopped: Callable[[], bool] = lambda: False
    streams: dict[Any, _Share] = field(default_factory=dict)
    grading: dict[Any, _Grading] = field(default_factory=dict)
    under_way_since: dict[int, float] = field(default_factory=dict)
    sent: int = 0

    def run(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Yield groups as they are graded, in any order. Grading runs beside generation.

        Raises:
            DeadlinePassed: after rollout.timeout_seconds.
            Interrupted: `stopped` says so.
            RoleFailed: workers die, or raise, again and again.
        """
        slices = SLICE_SECONDS if self.config.rollout.max_staleness_steps else None
        self.request = (completions, sampling, slices)
        try:
            yield from self._run(prompts)
        finally:
            for share in self.streams.values():
                self.clock.end("rollout", share.number)
            for entry in self.grading.values():
                self.clock.end("reward", entry.number)

    def _run(self, prompts: list[Prompt]) -> Iterator[Group]:
        limit = self.config.rollout.timeout_seconds
        deadline = time.monotonic() + limit
        owed = {prompt.index: prompt for prompt in prompts}
        for number in range(len(self.rollout)):
            self._generate(number, {prompt.index: prompt for prompt in prompts[number :: len(self.rollout)]})
        while owed:
            if self.stopped():
                raise Interrupted
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlinePassed(
                    f"{len(owed)} of {len(prompts)} groups were not back after rollout.timeout_seconds = {limit:g}: "
                    + self._who_is_waited_for()
                )
            ready, _ = ray.wait([*self.streams, *self.grading], num_returns=1, timeout=min(left, LOOK_SECONDS))
            finished = self._end_overdue()
            for item in ready:
                if item in self.grading:
                    finished += self._graded(item)
                elif item in self.streams:
                    self._generated(item)
            publish_grading_queue(self.config.name, len(self.grading))
            for group in finished:
                del owed[group.prompt.index]
                yield group
        self.rollout.settle()
        self.reward.settle()

    def _generate(self, number: int, prompts: dict[int, Prompt]) -> None:
        if prompts:
            handle = self.rollout[number]
            stream = handle.generate.remote(list(prompts.values()), *self.request)
            self.streams[stream] = _Share(number, handle, prompts)
            self.clock.begin("rollout", number)

    def _generated(self, stream: Any) -> None:
        """Take one group from a rollout worker, or give its prompts to another that takes its place."""
        share = self.streams[stream]
        try:
            group = ray.get(next(stream))
        except StopIteration:
            del self.streams[stream]
            if share.prompts and self.request[2] is not None:
                self.streams[share.handle.go_on.remote(self.request[2])] = share
                return
            self.clock.end("rollout", share.number)
            if share.prompts:
                place = self.rollout.places[share.number]
                raise RoleFailed(f"{place.name} ended without an answer to {len(share.prompts)} prompts") from None
        except RayError as error:
            del self.streams[stream]
            self.clock.end("rollout", share.number)
            self.rollout.replace(share.number, share.handle, error)
            self._generate(share.number, share.prompts)
        else:
            del share.prompts[group.prompt.index]
            self._grade(_Grading(group, self.sent % len(self.reward), None))
            self.sent += 1

    def _grade(self, entry: _Grading) -> None:
        entry.handle = self.reward[entry.number]
        if not any(other.number == entry.number for other in self.grading.values()):
            self.under_way_since[entry.number] = time.monotonic()
        self.grading[entry.handle.grade.remote(entry.group)] = entry
        self.clock.begin("reward", entry.number)

    def _graded(self, reference: Any) -> list[Group]:
        """The group, graded; or, when its reward worker died, none until another has graded it."""
        entry = self.grading[reference]
        try:
            group = ray.get(reference)
        except RayError as error:
            if isinstance(error, RayTaskError) and user_error(error) is None:
                raise RoleFailed(
                    f"grading sample {entry.group.prompt.sample_id!r} with reward.shaping {self.config.reward.shaping}: "
                    f"{tell(error, self.reward.places[entry.number])}"
                ) from error
            return self._another_reward_worker(entry, error, "error")
        del self.grading[reference]
        self.clock.end("reward", entry.number)
        self.under_way_since[entry.number] = time.monotonic()
        return [group]

    def _end_overdue(self) -> list[Group]:
        """Replace reward workers that were busy with one group for longer than reward.group_timeout_seconds; groups that
        have their verdict by that."""
        limit = self.config.reward.group_limit_seconds(self.request[0])
        finished: list[Group] = []
        firsts = {entry.number: reference for reference, entry in reversed(self.grading.items())}
        for number, reference in firsts.items():
            if time.monotonic() - self.under_way_since[number] <= limit or ray.wait([reference], timeout=0)[0]:
                continue
            entry = self.grading[reference]
            what = (
                f"did not grade sample {entry.group.prompt.sample_id!r} within reward.group_timeout_seconds = {limit:g}"
            )
            finished += self._another_reward_worker(entry, f"{self.reward.places[number].name} {what}", "timeout")
        return finished

    def _another_reward_worker(self, entry: _Grading, error: RayError | str, verdict: str) -> list[Group]:
        """Replace entry's worker and send what it had to the new one. The group it was busy with goes last, and gets its
        verdict when this is not the first worker that was lost with it."""
        had = {ref: other for ref, other in self.grading.items() if other.handle is entry.handle}
        for reference in had:
            del self.grading[reference]
            self.clock.end("reward", entry.number)
        busy, *others = had.values()
        self.reward.replace(entry.number, entry.handle, error)
        busy.losses += 1
        for other in others:
            self._grade(other)
        if busy.losses >= MOST_LOSSES:
            return [ungraded(busy.group, verdict)]
        self._grade(busy)
        return []

    def _who_is_waited_for(self) -> str:
        waiting = [
            f"{self.rollout.places[share.number].name} owes {len(share.prompts)} ({self.rollout.places[share.number].last_words()})"
            for share in self.streams.values()
            if share.prompts
        ]
        for number, place in enumerate(self.reward.places):
            count = sum(entry.number == number for entry in self.grading.values())
            if count:
                waiting.append(f"{place.name} owes {count} ({place.last_words()})")
        return ", ".join(waiting)


def ungraded(group: Group, reason: str) -> Group:
    """A group that could not be graded: every completion gets this verdict, and reward 0. They then have no advantage
    over each other, and the verdict is counted in grader/timeout or grader/error."""
    n = len(group.completions)
    group.correct, group.reasons = [False] * n, [reason] * n
    group.answers, group.rewards = [None] * n, [0.0] * n
    return group
