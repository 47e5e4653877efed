"""Rollout that goes on while the learner learns: the bound on staleness, completions carried on by new weights, and
that nothing is lost or doubled, on stand-ins whose times are known and in real runs."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from plumbline.errors import InputError, RunStopped
from plumbline.models.load import load_policy, load_tokenizer, policy_config
from plumbline.models.policy import Policy
from plumbline.rl import cluster, coldstart
from plumbline.rl.ahead import Ahead
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.clock import WorkClock
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.rollout import native
from plumbline.rl.rollout.native import NativeEngine
from plumbline.rl.telemetry import read_metrics
from plumbline.rl.text import Codec
from plumbline.selection.history import read_history
from plumbline.testing import train_quietly


def config(policy_path, output, staleness, **rollout):
    return parse_config(
        {
            "name": "tiny",
            "output": str(output),
            "seed": 3,
            "steps": 6,
            "policy": {"path": policy_path, "device": "cpu"},
            # Steps do not divide the set: epochs are crossed in the middle of one.
            "data": {"source": "procedural:train", "limit": 10},
            "rollout": {
                "prompts_per_step": 4,
                "completions_per_prompt": 3,
                "max_new_tokens": 40,
                "slots": 3,
                "threads_per_worker": 1,
                "max_staleness_steps": staleness,
            }
            | rollout,
            "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 512, "threads": 1},
            "reward": {"shaping": "plumbline.testing:short_is_good", "checking": {"share": 0.5, "credit": None}},
            "checkpoint": {"every_steps": 1, "keep": 3},
            "ray": {"dashboard": False, "start_timeout_seconds": 400},
        }
    )


class SlowCollector:
    """Fills a step in `seconds`, and notes the updates that the workers' weights had when it began."""

    def __init__(self, seconds):
        self.seconds, self.roles, self.began = seconds, SimpleNamespace(stop=threading.Event()), {}

    def fill(self, step):
        self.began[step] = self.ahead.updates
        time.sleep(self.seconds)
        if step == 99:
            raise RunStopped("nobody answers")
        return SimpleNamespace(step=step)

    def state_dict(self):
        return {"filled": max(self.began), "left_out": ["a"]}


@pytest.mark.parametrize("staleness", [1, 2, 3])
@pytest.mark.parametrize(("rollout", "learner"), [(0.0, 0.03), (0.03, 0.0), (0.01, 0.01)])
def test_no_step_begins_before_its_turn_and_none_waits_beyond_it(staleness, rollout, learner):
    cfg = config("embedded", "x", staleness).model_copy(update={"steps": 12})
    collector = SlowCollector(rollout)
    ahead = collector.ahead = Ahead(collector, cfg, 2)
    with ahead:
        for step in range(3, 13):
            assert ahead.take(step).step == step
            assert ahead.state(step) == {"filled": step, "left_out": ["a"]}
            time.sleep(learner)
            ahead.trained(step)
    leads = [step - 1 - updates for step, updates in collector.began.items()]
    assert list(collector.began) == list(range(3, 13))
    assert max(leads) <= staleness
    if learner > rollout:  # a rollout that is never late has got as far ahead as it may
        assert leads[staleness:] == [staleness] * (10 - staleness)


def test_what_fails_ahead_is_raised_where_its_step_is_taken():
    collector = SlowCollector(0.0)
    ahead = collector.ahead = Ahead(collector, config("embedded", "x", 2).model_copy(update={"steps": 101}), 97)
    with ahead:
        assert ahead.take(98).step == 98
        with pytest.raises(RunStopped, match="nobody answers"):
            ahead.take(99)


def test_a_run_that_ends_early_leaves_no_thread_behind():
    collector = SlowCollector(0.0)
    ahead = collector.ahead = Ahead(collector, config("embedded", "x", 1), 0)
    with ahead:
        ahead.take(1)
    assert not ahead.thread.is_alive()
    assert not collector.roles.stop.is_set()


def test_stalls_are_what_a_worker_has_nothing_to_do_in():
    now = [0.0]
    clock = WorkClock({"rollout": 2, "learner": 1, "reward": 0}, lambda: now[0])

    def at(second, what, *who):
        now[0] = second
        return what(*who)

    at(1, clock.begin, "rollout", 0)
    at(2, clock.begin, "rollout", 0)  # two calls at once are no more work than one
    at(3, clock.end, "rollout", 0)
    at(4, clock.end, "rollout", 0)
    at(6, clock.begin, "learner", 0)
    assert at(10, clock.lap) == {"rollout": 10 - 3 / 2, "learner": 6}
    at(12, clock.end, "learner", 0)
    assert at(15, clock.lap) == {"rollout": 5, "learner": 3}


PROMPTS = [Prompt(number, f"s{number}", list(range(5, 8 + 3 * number)), "?", "1") for number in range(3)]
SAMPLING = Sampling(30, seed=4)


@pytest.fixture(scope="module")
def paths(policy_path, tmp_path_factory):
    """The random policy, which is sparse, and one with full attention."""
    torch.manual_seed(1)
    shape, folder = policy_config(policy_path), tmp_path_factory.mktemp("full")
    shape.attention = "full"
    coldstart.save(Policy(shape), load_tokenizer(policy_path), folder)
    return {"nsa": policy_path, "full": str(folder)}


def engine(policy_path, on_device=False):
    made = NativeEngine(policy_path, attention=None, codec=Codec(policy_path), slots=4, device="cpu")
    made.on_device = on_device
    return made


def answered(groups):
    found = sorted((group for group in groups if group is not None), key=lambda group: group.prompt.index)
    return [(group.prompt, completion) for group in found for completion in group.completions]


def logprobs(policy, prompt, completion):
    """By definition: one forward pass over the whole sequence."""
    ids = torch.tensor(prompt.token_ids + completion.token_ids)
    with torch.no_grad():
        logits = policy(ids, torch.tensor([0, len(ids)], dtype=torch.int32)).log_softmax(-1)
    first = len(prompt.token_ids) - 1
    return logits[first:-1].gather(-1, ids[first + 1 :, None]).squeeze(-1)


@pytest.mark.parametrize(
    ("attention", "on_device"),
    [
        ("full", False),
        ("nsa", False),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("nsa", True, marks=pytest.mark.slow),
    ],
)
def test_new_weights_carry_completions_on(attention, on_device, paths, monkeypatch):
    """Each token's log-probability is that of the weights which drew it, on everything before it; Completion.versions says
    which those were. With the same weights under a new version nothing changes."""
    if on_device and torch.cuda.is_available():
        pytest.skip("the kernels' interpreter needs a machine without CUDA")
    monkeypatch.setattr(native, "STEPS_PER_LOOK", 6)  # completions under way must be there at a look
    plain = answered(engine(paths[attention], on_device).generate(PROMPTS, 2, SAMPLING))

    def weights(policy):
        return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}

    def interrupted(change, after):
        worker = engine(paths[attention], on_device)
        old = load_policy(paths[attention], dtype=torch.float32)
        new = load_policy(paths[attention], dtype=torch.float32)
        new.load_state_dict({name: tensor * change for name, tensor in weights(worker.policy).items()}, strict=False)
        groups = []
        for pause, group in enumerate(worker.generate_in_parts(PROMPTS, 2, SAMPLING)):
            groups.append(group)
            if pause == after:
                worker.load_weights(7, weights(new))
        return old, new, groups

    after = 1 if on_device else 9
    _, _, same = interrupted(1.0, after)
    for (_, here), (_, there) in zip(answered(same), plain, strict=True):
        assert here.token_ids == there.token_ids
        torch.testing.assert_close(torch.tensor(here.logprobs), torch.tensor(there.logprobs), atol=1e-5, rtol=0)

    old, new, groups = interrupted(1.5, after)
    switched = 0
    for prompt, completion in answered(groups):
        by_old, by_new = logprobs(old, prompt, completion), logprobs(new, prompt, completion)
        versions = dict(completion.versions)
        assert set(versions.values()) <= {0, 7}
        n = len(completion.token_ids)
        switch = next((first for first, version in completion.versions if version == 7), n)
        switched += 0 < switch < n
        expected = torch.cat([by_old[:switch], by_new[switch:]])
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
        if 0 < switch < n:
            assert (by_old[switch:] - by_new[switch:]).abs().max() > 1e-3
    assert switched >= 2
    for group in groups:
        if group is not None:
            assert group.policy_version == min(c.versions[0][1] for c in group.completions)


@pytest.fixture(scope="module")
def roles(policy_path, tmp_path_factory):
    with Roles.start(config(policy_path, tmp_path_factory.mktemp("cluster"), 0)) as roles:
        yield roles


def drawn(cfg):
    """Which samples were seen when, whatever was answered."""
    return read_history(cfg.folder / "history").select(["step", "epoch", "sample_id", "rollout"])


@pytest.fixture(scope="module")
def in_turns(policy_path, roles, tmp_path_factory):
    cfg = config(policy_path, tmp_path_factory.mktemp("turns"), 0)
    train_quietly(cfg, roles)
    return cfg


@pytest.fixture
def slow_learner(monkeypatch):
    update = cluster.Roles.update

    def slow(self, batch):
        time.sleep(0.7)
        return update(self, batch)

    monkeypatch.setattr(cluster.Roles, "update", slow)


@pytest.mark.parametrize("staleness", [1, 2])
def test_a_slow_learner_learns_from_weights_within_the_bound(
    staleness, in_turns, roles, policy_path, tmp_path, slow_learner
):
    cfg = config(policy_path, tmp_path, staleness)
    train_quietly(cfg, roles)
    rows = read_metrics(cfg.folder)
    oldest = [row["rollout/staleness_max"] for row in rows]
    assert max(oldest) <= staleness
    assert max(oldest) > 0
    assert drawn(cfg).equals(drawn(in_turns))
    # The weights of a later update are there in time for the steps that must have them.
    history = read_history(cfg.folder / "history").to_pylist()
    assert all(row["step"] - 1 - row["policy_version"] <= staleness for row in history)
    assert all(
        0 <= row[f"stall/{role}_seconds"] <= row["time/step_seconds"] + 0.1
        for row in rows
        for role in ("rollout", "reward", "learner")
    )
    # From the second step on the groups are there before the learner asks.
    assert sum(row["stall/learner_seconds"] for row in rows[2:]) < sum(row["time/step_seconds"] for row in rows[2:])


def test_a_slow_rollout_is_carried_on_by_new_weights(in_turns, roles, policy_path, tmp_path):
    cfg = config(policy_path, tmp_path, 1, max_new_tokens=120)
    train_quietly(cfg, roles)
    rows = read_metrics(cfg.folder)
    assert len(rows) == cfg.steps
    assert max(row["rollout/staleness_max"] for row in rows) == 1
    assert max(row["rollout/carried_over"] for row in rows) > 0
    assert drawn(cfg).equals(drawn(in_turns))


def test_a_stopped_run_goes_on_with_every_sample_once(
    in_turns, roles, policy_path, tmp_path, monkeypatch, slow_learner
):
    cfg = config(policy_path, tmp_path, 2)
    update = cluster.Roles.update
    updates = []

    def stops(self, batch):
        updates.append(batch)
        if len(updates) == 4:
            raise RunStopped("the learner is gone")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(cluster.Roles, "update", stops)
        with pytest.raises(RunStopped, match="gone"):
            train_quietly(cfg, roles)
    assert not roles.stop.is_set()
    train_quietly(cfg, roles, resume=True)
    assert [row["step"] for row in read_metrics(cfg.folder)] == list(range(1, 7))
    assert max(row["rollout/staleness_max"] for row in read_metrics(cfg.folder)) <= 2
    assert drawn(cfg).equals(drawn(in_turns))


def test_a_worker_killed_between_updates_costs_no_sample(in_turns, roles, policy_path, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path, 2)
    update = cluster.Roles.update
    killed = []

    def kills(self, batch):
        if not killed:
            killed.append(os.kill(self.rollout.places[0].pid, signal.SIGKILL))
        return update(self, batch)

    before = roles.replaced
    monkeypatch.setattr(cluster.Roles, "update", kills)
    train_quietly(cfg, roles)
    assert roles.replaced == before + 1
    assert read_metrics(cfg.folder)[-1]["replaced_workers"] == roles.replaced
    assert max(row["rollout/staleness_max"] for row in read_metrics(cfg.folder)) <= 2
    assert drawn(cfg).equals(drawn(in_turns))


def test_an_engine_that_takes_no_weights_in_between_is_refused(policy_path, tmp_path):
    with pytest.raises(InputError, match=r"max_staleness_steps \(1\) needs rollout\.engine native"):
        config(policy_path, tmp_path, 1, engine="vllm")
