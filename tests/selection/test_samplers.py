"""Samplers do what their papers say on policies with known success rates, and resume exactly."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from plumbline.selection.dynamic_samplers import SAMPLERS, DynamicSampler, GresoSampler, SpeedSampler
from plumbline.selection.samplers import CurriculumSampler, Draw, PrioritisedSampler, UniformSampler, collect

IDS = [f"s{i}" for i in range(40)]
RATES = dict(zip(IDS, np.linspace(0, 1, 40), strict=True))


class Policy:
    """Answers sample i correctly with probability rates[i]."""

    def __init__(self, rates, seed=0):
        self.rates, self.rng = rates, np.random.default_rng(seed)

    def __call__(self, asked):
        return [(self.rng.random(number) < self.rates[draw.sample_id]).tolist() for draw, number in asked]


def make(name, seed=0):
    options = {
        "curriculum": {"difficulty": {i: 1 - RATES[i] for i in IDS}},
        "speed": {"screening": 2, "completions": 8},
    }
    return SAMPLERS[name](IDS, seed, **options.get(name, {}))


def steps(sampler, count, seed=0, pending=None):
    policy = Policy(RATES, seed)
    drawn = []
    for _ in range(count):
        batch = collect(sampler, 7, 8, policy, pending=pending)
        pending = batch.pending
        drawn.append(batch.groups)
    return drawn, pending


@pytest.mark.parametrize("name", SAMPLERS)
def test_resuming_equals_never_having_stopped(name):
    whole = make(name)
    _, pending = steps(whole, 9)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = make(name)
    resumed.load_state_dict(state)
    assert steps(whole, 9, 1, pending) == steps(resumed, 9, 1, pending)
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_seed_or_set_is_refused(name):
    state = make(name).state_dict()
    with pytest.raises(ValueError, match="seed 0, this one has 1"):
        make(name, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has kind"):
        make("greso" if name != "greso" else "uniform").load_state_dict(state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_draws_the_same(name):
    assert steps(make(name), 5) == steps(make(name), 5)
    if name != "speed":
        assert make(name, 0).next(7) != make(name, 1).next(7)


@pytest.mark.parametrize(("ids", "words"), [([], "at least one"), (["a", "a"], "unique")])
def test_bad_ids(ids, words):
    with pytest.raises(ValueError, match=words):
        UniformSampler(ids, 0)


@pytest.mark.parametrize("batch", [1, 7, 40, 41, 95])
def test_uniform_never_skips_or_repeats_across_epochs(batch):
    sampler = UniformSampler(IDS, 3)
    draws = [draw for _ in range(-(-200 // batch)) for draw in sampler.next(batch)][:200]
    for epoch in range(5):
        part = draws[40 * epoch : 40 * epoch + 40]
        assert {draw.epoch for draw in part} == {epoch}
        assert sorted(draw.sample_id for draw in part) == sorted(IDS)
    assert [d.sample_id for d in draws[:40]] != [d.sample_id for d in draws[40:80]]


def test_curriculum_opens_from_easy_to_hard():
    sampler = CurriculumSampler(IDS, 0, difficulty={i: float(i[1:]) for i in IDS}, start=0.25, passes=2)
    first = sampler.next(10)
    assert {int(draw.sample_id[1:]) for draw in first} == set(range(10))
    hardest = []
    for _ in range(7):
        hardest.append(max(int(draw.sample_id[1:]) for draw in sampler.next(10)))
    assert hardest == sorted(hardest)
    sampler.next(40)
    assert sampler.open_count() == 40
    assert set(sampler.visits) != {0}
    with pytest.raises(ValueError, match="no difficulty, the first is 's1'"):
        CurriculumSampler(["s0", "s1"], 0, difficulty={"s0": 1})


def test_prioritised_draws_in_proportion_to_failure():
    sampler = PrioritisedSampler(["never", "half", "rarely", "solved"], 0, memory=0)
    sampler.update({"never": [False] * 4, "half": [True, False], "rarely": [True, True, True, False], "solved": [True]})
    counts = Counter()
    for _ in range(8000):
        counts[sampler.next(1)[0].sample_id] += 1
    total = 1 + 0.5 + 0.25
    for name, weight in (("never", 1), ("half", 0.5), ("rarely", 0.25)):
        assert counts[name] / 8000 == pytest.approx(weight / total, abs=0.02)
    assert counts["solved"] == 0
    assert {draw.sample_id for draw in sampler.next(4)} == {"never", "half", "rarely", "solved"}


def test_prioritised_sees_everything_before_it_prefers():
    sampler = PrioritisedSampler(IDS, 0)
    seen = Counter()
    for _ in range(4):
        draws = sampler.next(10)
        sampler.update({draw.sample_id: [True] for draw in draws})
        seen.update(draw.sample_id for draw in draws)
    assert set(seen.values()) == {1}


def test_prioritised_success_rates_forget():
    sampler = PrioritisedSampler(["a"], 0, memory=0.75)
    sampler.update({"a": [False, False]})
    sampler.update({"a": [True, True]})
    assert sampler.success[0] == pytest.approx(0.25)


def test_dynamic_keeps_mixed_groups_and_refills():
    sampler = DynamicSampler(IDS, 0)
    batch = collect(sampler, 12, 8, Policy(RATES))
    assert len(batch.groups) == 12
    assert all(0 < sum(correct) < 8 for _, correct in batch.groups)
    assert batch.rounds > 1
    assert batch.rollouts > 12 * 8
    hopeless = collect(DynamicSampler(IDS, 0), 12, 8, Policy(dict.fromkeys(IDS, 0.0)), max_rounds=3)
    assert hopeless.groups == []
    assert hopeless.rounds == 3


def test_greso_skips_with_the_papers_probability():
    sampler = GresoSampler(["flat", "mixed"], 0, explore=0.5, step=0.0)
    for _ in range(2):
        sampler.update({"flat": [False] * 4, "mixed": [True, False]})
    assert sampler.skip_probability("flat") == pytest.approx(1 - 0.5**2)
    assert sampler.skip_probability("mixed") == 0
    draws = [sampler.next(1)[0].sample_id for _ in range(4000)]
    counts = Counter(draws)
    # Of as many turns each, all of `mixed` and a quarter of `flat` come through.
    assert counts["flat"] / counts["mixed"] == pytest.approx(0.25, abs=0.03)
    sampler.update({"flat": [True, False]})
    assert sampler.skip_probability("flat") == 0


def test_greso_moves_its_exploration_towards_the_wanted_shares():
    sampler = GresoSampler(IDS, 0, explore=0.5, step=0.01, easy_share=0.25, hard_share=0.25)
    sampler.update({"s0": [True] * 4, "s1": [True] * 4, "s2": [True, False], "s3": [True, False]})
    assert sampler.explore["easy"] == pytest.approx(0.49)
    assert sampler.explore["hard"] == pytest.approx(0.51)
    for _ in range(200):
        sampler.update({"s0": [True] * 4})
    assert sampler.explore["easy"] == sampler.floor
    assert sampler.explore["hard"] == 1.0


def test_greso_spends_less_than_dynamic_on_the_same_batches():
    rates = {name: 0.0 if i < 20 else 1.0 if i < 30 else 0.5 for i, name in enumerate(IDS)}
    spent = {}
    for kind in (DynamicSampler, GresoSampler):
        sampler, policy = kind(IDS, 0), Policy(rates)
        spent[kind] = sum(collect(sampler, 8, 8, policy, max_rounds=50).rollouts for _ in range(40))
    assert spent[GresoSampler] < 0.7 * spent[DynamicSampler]


def test_greso_does_not_hang_when_all_is_flat():
    sampler = GresoSampler(["a", "b"], 0, explore=0.05, floor=0.0)
    for _ in range(40):
        sampler.update({"a": [False], "b": [True]})
    assert len(sampler.next(3)) == 3


def test_speed_continues_only_middling_prompts():
    rates = {name: 0.0 if i < 20 else 1.0 if i < 30 else 0.5 for i, name in enumerate(IDS)}
    sampler, policy = SpeedSampler(IDS, 0, screening=4, completions=16), Policy(rates)
    pending = {}
    spent, kept = 0, []
    for _ in range(30):
        batch = collect(sampler, 8, 16, policy, pending=pending, max_rounds=50)
        pending = batch.pending
        spent += batch.rollouts
        kept += batch.groups
    assert len(kept) == 240
    assert all(len(correct) == 16 for _, correct in kept)
    assert {rates[draw.sample_id] for draw, _ in kept} == {0.5}
    # A prompt in four is middling: a group costs about 16 + 3 x 4 and the odd unlucky screening, not 4 x 16.
    assert spent / 240 < 40


def test_speed_asks_for_the_rest_first():
    sampler = SpeedSampler(["a", "b", "c"], 0, screening=2, completions=6)
    first = sampler.next(3)
    assert {draw.rollouts for draw in first} == {2}
    sampler.update(
        {first[0].sample_id: [True, False], first[1].sample_id: [True, True], first[2].sample_id: [False, False]}
    )
    second = sampler.next(3)
    assert second[0] == Draw(first[0].sample_id, 0, 4)
    assert {draw.rollouts for draw in second[1:]} == {2}
    assert sampler.keeps(first[0].sample_id, [True] * 6)
    assert not sampler.keeps(second[1].sample_id, [True, False])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"screening": 8, "completions": 8}, "below the group's 8"), ({"low": 0.7, "high": 0.6}, "low < high")],
)
def test_speed_refuses_nonsense(options, words):
    with pytest.raises(ValueError, match=words):
        SpeedSampler(IDS, 0, **options)


@pytest.mark.parametrize("kind", sorted(SAMPLERS))
def test_what_is_left_out_is_never_drawn_again(kind):
    ids = [f"s{number}" for number in range(12)]
    options = (
        {"difficulty": {sample_id: number for number, sample_id in enumerate(ids)}} if kind == "curriculum" else {}
    )
    sampler = SAMPLERS[kind](ids, 0, **options)
    sampler.next(5)
    sampler.leave_out(["s0", "s7", "unknown"])
    copy = SAMPLERS[kind](ids, 0, **options)
    copy.load_state_dict(sampler.state_dict())
    drawn = []
    for _ in range(8):
        draws = sampler.next(6)
        drawn += draws
        assert copy.next(6) == draws
    assert {draw.sample_id for draw in drawn}.isdisjoint({"s0", "s7"})
    assert len({draw.sample_id for draw in drawn}) == 10 or kind == "curriculum"
    with pytest.raises(ValueError, match="left out"):
        sampler.leave_out(ids)
