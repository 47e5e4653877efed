"""Filling a training step: the sampler names prompts, they are rolled out and graded, and what it keeps is trained on."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from plumbline.errors import InputError
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.selection.dynamic_samplers import SAMPLERS
from plumbline.selection.samplers import Draw, Sampler, collect

if TYPE_CHECKING:
    # Settings are checked with make_sampler before anything as heavy as Ray is imported.
    from plumbline.rl.cluster import Roles
    from plumbline.rl.config import RunConfig
    from plumbline.rl.tasks import TaskSet


@dataclass
class Filled:
    """A step's groups.

    Attributes:
        groups: to train on, whole and of one size.
        graded: everything rolled out in this step, in the order asked for: dropped groups and screenings too.
        metrics: what the sampler did.
        seconds: that filling the step took.
    """

    groups: list[Group]
    graded: list[Group]
    metrics: dict[str, float]
    seconds: float = field(default=0.0, compare=False)


class Collector:
    """Owns the sampler of a training run, and groups it began in one step and finishes in a later one.

    Args:
        config: the run's.
        roles: that roll out and grade.
        tasks: the training set.

    Raises:
        InputError: sampler settings that do not fit the run or its data.
    """

    def __init__(self, config: RunConfig, roles: Roles, tasks: TaskSet) -> None:
        self.config, self.roles, self.tasks = config, roles, tasks
        self.sampler = make_sampler(config, tasks)
        self.pending: dict[tuple[str, int], Group] = {}
        self.to_leave_out: set[str] = set()

    def leave_out(self, sample_ids: Iterable[str]) -> None:
        """Draw these no more (quarantine), from the next step to be filled on. Raises ValueError if nothing would be left."""
        self.to_leave_out |= set(sample_ids)
        if len(self._left_out()) == len(self.sampler.sample_ids):
            raise ValueError(f"all {len(self.sampler.sample_ids)} samples would be left out")

    def _left_out(self) -> set[str]:
        return self.sampler.left_out | (self.to_leave_out & set(self.sampler.place))

    def fill(self, step: int) -> Filled:
        """Roll out until rollout.prompts_per_step groups are kept, or selection.sampler.max_rounds is reached.

        A step of which nothing is kept trains on whole groups of what it rolled out, whose advantages are 0 unless the
        reward says more than right and wrong.
        """
        began = time.monotonic()
        self.sampler.leave_out(self.to_leave_out)
        size, whole = self.config.rollout.prompts_per_step, self.config.rollout.completions_per_prompt
        begun, self.pending = dict(self.pending), {}
        graded: list[Group] = []

        def roll_out(asked: list[tuple[Draw, int]]) -> list[list[bool]]:
            groups = self._roll_out(asked, begun, step)
            for (draw, _), group in zip(asked, groups, strict=True):
                key = (draw.sample_id, draw.epoch)
                begun[key] = _joined(begun.get(key), group)
            graded.extend(groups)
            return [group.correct for group in groups]

        result = collect(
            self.sampler,
            size,
            whole,
            roll_out,
            pending={key: group.correct for key, group in begun.items()},
            max_rounds=self.config.selection.sampler.max_rounds,
        )
        self.pending = {key: begun[key] for key in result.pending}
        kept = [begun[draw.sample_id, draw.epoch] for draw, _ in result.groups]
        if not kept:
            keys = dict.fromkeys((group.prompt.sample_id, group.prompt.epoch) for group in graded)
            spare = [begun[key] for key in keys if key not in self.pending]
            kept = [group for group in spare if len(group.completions) == len(spare[0].completions)][:size]
        metrics = {
            "selection/rounds": float(result.rounds),
            "selection/groups_rolled_out": float(len(graded)),
            "selection/groups_kept": float(len(result.groups)),
            **{f"selection/{name}": value for name, value in self.sampler.metrics().items()},
        }
        return Filled(kept, graded, metrics, time.monotonic() - began)

    def _roll_out(
        self, asked: list[tuple[Draw, int]], begun: Mapping[tuple[str, int], Group], step: int
    ) -> list[Group]:
        """Graded groups of what was asked, in that order."""
        settings = self.config.rollout
        sampling = Sampling(
            settings.max_new_tokens,
            settings.temperature,
            seed=self.config.seed,
            record_blocks=settings.replay_blocks,
        )
        found: dict[int, Group] = {}
        for completions in dict.fromkeys(number for _, number in asked):
            prompts = []
            for index, (draw, number) in enumerate(asked):
                if number == completions:
                    before = begun.get((draw.sample_id, draw.epoch))
                    drawn = len(before.completions) if before else 0
                    task = self.tasks[draw.sample_id]
                    prompts.append(task.prompt(index, epoch=draw.epoch, key=step, first_rollout=drawn))
            for group in self.roles.graded_groups(prompts, completions, sampling):
                found[group.prompt.index] = group
        return [found[index] for index in range(len(asked))]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later steps, in JSON's types."""
        left_out = sorted(self._left_out())
        return {
            **self.sampler.state_dict(),
            "left_out": left_out,
            "pending": [_plain(group) for group in self.pending.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where state_dict was taken. InputError for another sampler, seed or number of samples."""
        try:
            self.sampler.load_state_dict(state)
        except ValueError as error:
            raise InputError(f"{error}; keep selection.sampler and seed when resuming") from None
        groups = [
            Group(
                **{**entry, "prompt": Prompt(**entry["prompt"]), "completions": [_completion(c) for c in completions]}
            )
            for entry in state["pending"]
            for completions in [entry["completions"]]
        ]
        self.pending = {(group.prompt.sample_id, group.prompt.epoch): group for group in groups}


def make_sampler(config: RunConfig, tasks: TaskSet) -> Sampler:
    """The sampler that config.selection.sampler names. InputError where its settings do not fit."""
    settings = config.selection.sampler
    options: dict[str, Any] = {}
    if settings.name == "curriculum":
        difficulty = {sample_id: _difficulty(tasks, sample_id, settings.difficulty) for sample_id in tasks}
        options = {"difficulty": difficulty, "start": settings.start, "passes": settings.passes}
    elif settings.name == "prioritised":
        options = {"memory": settings.memory}
    elif settings.name == "greso":
        options = {
            "easy_share": settings.easy_share,
            "hard_share": settings.hard_share,
            "explore": settings.explore,
            "floor": settings.explore_floor,
            "step": settings.explore_step,
        }
    elif settings.name == "speed":
        options = {
            "screening": settings.screening,
            "completions": config.rollout.completions_per_prompt,
            "low": settings.low,
            "high": settings.high,
        }
    try:
        return SAMPLERS[settings.name](list(tasks), config.seed, **options)
    except ValueError as error:
        raise InputError(f"selection.sampler {settings.name}: {error}") from None


def _difficulty(tasks: TaskSet, sample_id: str, column: str) -> float:
    """The first number in a column of the problem: a level, or a word with one, as MATH's `Level 3`."""
    value = tasks[sample_id].problem.extras.get(column)
    number = re.search(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", str(value))
    if number is None:
        raise InputError(
            f"selection.sampler.difficulty: problem {sample_id} has no number in its column {column!r} ({value!r}); "
            "name a column of levels, or one minus a pass rate"
        )
    return float(number.group())


def _plain(group: Group) -> dict[str, Any]:
    """A group in JSON's types."""
    entry = asdict(group)
    for completion in entry["completions"]:
        completion["blocks"] = base64.b64encode(completion["blocks"]).decode()
    return entry


def _completion(entry: dict[str, Any]) -> Completion:
    """A completion of what _plain made."""
    return Completion(**{**entry, "blocks": base64.b64decode(entry.get("blocks", ""))})


def _joined(first: Group | None, second: Group) -> Group:
    """One group of both halves, as old as the older."""
    if first is None:
        return second
    return replace(
        first,
        completions=first.completions + second.completions,
        policy_version=min(first.policy_version, second.policy_version),
        correct=first.correct + second.correct,
        reasons=first.reasons + second.reasons,
        answers=first.answers + second.answers,
        rewards=first.rewards + second.rewards,
    )
