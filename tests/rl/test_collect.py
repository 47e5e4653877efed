"""Filling a step with each sampler, on stand-in workers whose success rates are known; no Ray."""

from __future__ import annotations

import json

import pytest

from plumbline.errors import InputError
from plumbline.rl.batch import Completion, Group
from plumbline.rl.collect import Collector, make_sampler
from plumbline.rl.config import parse_config
from plumbline.rl.data import Problem
from plumbline.rl.records import history_rows
from plumbline.rl.rollout.sampler import sequence_key
from plumbline.rl.tasks import Task

IDS = [f"p{i}" for i in range(12)]
# Two never solved, two always, the others now and then.
RATES = {name: {0: 0.0, 1: 1.0}.get(i % 6, 0.5) for i, name in enumerate(IDS)}


def config(name="uniform", **settings):
    return parse_config(
        {
            "name": "t",
            "seed": 5,
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 6},
            "selection": {"sampler": {"name": name, **settings}},
        }
    )


class Tasks(dict):
    """Problems by id, with a level."""

    def __init__(self, column="level", value=lambda i: f"Level {i % 5}"):
        super().__init__()
        for i, name in enumerate(IDS):
            self[name] = Task(Problem(name, f"{name}?", "1", {column: value(i)}), [i, 1])


class Workers:
    """What graded_groups gives: as lucky as the sequence's own key says, in reverse order."""

    def __init__(self, rates=RATES):
        self.rates, self.version, self.calls = rates, 0, []

    def graded_groups(self, prompts, completions, sampling):
        self.calls.append(([prompt.sample_id for prompt in prompts], completions))
        for prompt in reversed(prompts):
            keys = [sequence_key(sampling.seed, prompt, number) for number in range(completions)]
            correct = [key / 2**63 < self.rates[prompt.sample_id] for key in keys]
            answers = [Completion([key % 97, 1], [-0.1, -key / 2**63], "x", False) for key in keys]
            yield Group(prompt, answers, self.version, correct, ["x"] * completions, [None] * completions,
                        [float(c) for c in correct])  # fmt: skip


def filled(name, steps=6, rates=RATES, **settings):
    workers = Workers(rates)
    collector = Collector(config(name, **settings), workers, Tasks())
    out = []
    for step in range(1, steps + 1):
        workers.version = step - 1
        out.append(collector.fill(step))
    return collector, workers, out


def test_uniform_keeps_everything_in_order():
    _, workers, steps = filled("uniform", steps=3)
    for step, part in enumerate(steps, start=1):
        assert part.groups == part.graded
        assert [group.prompt.index for group in part.groups] == [0, 1, 2, 3]
        assert {group.prompt.key for group in part.groups} == {step}
        assert part.metrics["selection/rounds"] == 1
    assert sorted(group.prompt.sample_id for part in steps for group in part.groups) == sorted(IDS)
    assert all(completions == 6 for _, completions in workers.calls)


@pytest.mark.parametrize("name", ["dynamic", "greso"])
def test_flat_groups_are_dropped_and_the_batch_refilled(name):
    _, _, steps = filled(name)
    for part in steps:
        assert len(part.groups) == 4
        assert all(0 < sum(group.correct) < 6 for group in part.groups)
        assert len(part.graded) == part.metrics["selection/groups_rolled_out"] >= 4
    assert any(len(part.graded) > 4 for part in steps)


def test_speed_screens_first_and_joins_both_halves():
    collector, workers, steps = filled("speed", screening=2, max_rounds=3)
    assert {completions for _, completions in workers.calls} == {2, 4}
    whole = [part for part in steps if part.metrics["selection/groups_kept"]]
    for part in steps:
        for group in part.groups if part in whole else []:
            assert len(group.completions) == len(group.correct) == len(group.rewards) == 6
            assert 0 < sum(group.correct[:2]) < 2
            # The second half is no repetition of the first.
            assert len({tuple(c.logprobs) for c in group.completions}) == 6
        rows = history_rows(part.graded, 1)
        assert len({(row["sample_id"], row["epoch"], row["rollout"]) for row in rows}) == len(rows)
    assert sum(len(part.groups) for part in whole) > 8
    for group in collector.pending.values():
        assert len(group.completions) == 2


@pytest.mark.parametrize("name", ["uniform", "curriculum", "prioritised", "dynamic", "greso", "speed"])
def test_going_on_from_a_saved_state_changes_nothing(name):
    settings = {"screening": 2, "max_rounds": 2} if name == "speed" else {}
    _, _, whole = filled(name, steps=12, **settings)
    stop = 4
    collector, _, _ = filled(name, steps=stop, **settings)
    while name == "speed" and not collector.pending:
        # Go on to a step that leaves a group half done.
        stop += 1
        collector, _, _ = filled(name, steps=stop, **settings)
    assert stop < 12
    state = json.loads(json.dumps(collector.state_dict()))
    workers = Workers()
    again = Collector(config(name, **settings), workers, Tasks())
    again.load_state_dict(state)
    assert again.pending == collector.pending
    for step in range(stop + 1, 13):
        workers.version = step - 1
        assert again.fill(step) == whole[step - 1]


def test_a_step_of_which_nothing_is_kept_is_not_empty():
    never = dict.fromkeys(IDS, 0.0)
    for name in ("dynamic", "greso", "speed"):
        _, _, (part,) = filled(name, steps=1, rates=never, max_rounds=2)
        assert part.metrics["selection/groups_kept"] == 0
        assert part.metrics["selection/rounds"] == 2
        assert len(part.groups) == 4
        assert len({len(group.completions) for group in part.groups}) == 1


def test_curriculum_reads_the_level():
    collector, _, (part,) = filled("curriculum", steps=1, start=0.35)
    assert {group.prompt.sample_id for group in part.groups} <= {"p0", "p5", "p10", "p1", "p6", "p11"}
    assert 0.35 < collector.sampler.metrics()["open_share"] < 1
    sampler = make_sampler(config("curriculum", difficulty="hard"), Tasks("hard", lambda i: 1e-3 * i))
    assert sampler.easiest_first[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "tasks", "words"),
    [
        ({"name": "curriculum", "difficulty": "depth"}, Tasks(), "no number in its column 'depth'"),
        ({"name": "curriculum"}, Tasks(value=lambda i: "easy"), "no number in its column 'level'"),
        ({"name": "speed", "screening": 6}, Tasks(), "screening must be at least 1 and below the group's 6"),
        ({"name": "speed", "low": 0.6, "high": 0.5}, Tasks(), "need 0 <= low < high <= 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, tasks, words):
    with pytest.raises(InputError, match=words):
        make_sampler(config(**settings), tasks)


def test_another_sampler_is_refused_when_resuming():
    collector, _, _ = filled("greso", steps=1)
    other = Collector(config("dynamic"), Workers(), Tasks())
    with pytest.raises(InputError, match=r"keep selection\.sampler and seed"):
        other.load_state_dict(collector.state_dict())
