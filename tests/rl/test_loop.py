"""Training for real on a local Ray cluster with a tiny policy: what a run leaves behind, and that resuming changes nothing."""

import json
import shutil

import pytest
import torch

from plumbline.errors import InputError
from plumbline.models.load import load_policy, load_tokenizer, policy_config
from plumbline.models.policy import Policy
from plumbline.rl import coldstart
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.telemetry import read_metrics
from plumbline.selection.history import read_history
from plumbline.testing import changed, train_quietly


def config(policy_path, output, **changes):
    tree = {
        "name": "tiny",
        "output": str(output),
        "seed": 3,
        "steps": 4,
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 10},
        # Prompts a step do not divide the set, so the runs below cross epochs in the middle of a step.
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 6},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 64, "threads": 1, "warmup_steps": 1},
        # Lengths are no measure of correctness, so the reward check looks at the verdicts alone.
        "reward": {"shaping": "plumbline.testing:short_is_good", "checking": {"share": 0.5, "credit": None}},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "ray": {"dashboard": False},
    }
    return parse_config(changed(tree, **changes))


@pytest.fixture(scope="module")
def roles(policy_path, tmp_path_factory):
    with Roles.start(config(policy_path, tmp_path_factory.mktemp("cluster"))) as roles:
        yield roles


def weights(result):
    return load_policy(result.policy, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def straight(policy_path, roles, tmp_path_factory):
    cfg = config(policy_path, tmp_path_factory.mktemp("straight"))
    return cfg, train_quietly(cfg, roles)


def test_a_run_leaves_everything_behind(straight, policy_path):
    cfg, result = straight
    assert result.rollouts == 4 * 4 * 3
    history = read_history(cfg.folder / "history").to_pylist()
    assert len(history) == result.rollouts
    assert {row["run"] for row in history} == {"tiny"}
    assert [row["policy_version"] for row in history] == [step for step in range(4) for _ in range(12)]
    metrics = read_metrics(cfg.folder)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["learner/skipped_steps"] == 0 for row in metrics)
    # On policy and on one machine, the learner's log-probabilities are the rollout's.
    assert metrics[0]["learner/ratio_max"] == pytest.approx(1, abs=1e-4)
    completions = [
        json.loads(line) for path in sorted((cfg.folder / "completions").glob("*.jsonl")) for line in path.open()
    ]
    assert len(completions) == result.rollouts
    assert [row["sample_id"] for row in completions] == [row["sample_id"] for row in history]
    assert len(list((cfg.folder / "tensorboard").iterdir())) == 1
    assert all(row["check/completions"] == 12 and row["check/decision"] == 0 for row in metrics)
    assert 0 < sum(row["check/regraded"] for row in metrics) < result.rollouts
    assert json.loads((cfg.folder / "check.json").read_text())["totals"]["completions"] == result.rollouts
    start, end = load_policy(policy_path, dtype=torch.float32).state_dict(), weights(result)
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_every_sample_comes_once_an_epoch(straight):
    cfg, _ = straight
    rows = read_history(cfg.folder / "history").to_pylist()
    first_epoch = [row["sample_id"] for row in rows if row["epoch"] == 0 and row["rollout"] == 0]
    assert len(first_epoch) == len(set(first_epoch)) == 10


def test_two_plus_two_steps_equal_four(straight, policy_path, roles, tmp_path):
    source, whole = straight
    cfg = config(policy_path, tmp_path)
    train_quietly(cfg.model_copy(update={"steps": 2}), roles)
    # What a killed run wrote after its checkpoint must not be counted twice.
    shutil.copytree(cfg.folder / "checkpoints" / "step-000002", tmp_path / "kept")
    train_quietly(cfg.model_copy(update={"steps": 3}), roles, resume=True)
    shutil.rmtree(cfg.folder / "checkpoints" / "step-000003")
    parts = train_quietly(cfg, roles, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    assert read_history(cfg.folder / "history").num_rows == 4 * 12
    assert [row["step"] for row in read_metrics(cfg.folder)] == [1, 2, 3, 4]
    assert (cfg.folder / "check.json").read_text() == (source.folder / "check.json").read_text()


@pytest.mark.parametrize("sampler", ["speed", "greso"])
def test_two_plus_two_steps_equal_four_with_a_sampler_that_drops(sampler, roles, tmp_path):
    """The embedded policy is right now and then, so groups are dropped, begun in one step and finished in the next."""
    changes = {
        "selection": {"sampler": {"name": sampler, "screening": 2, "max_rounds": 2}},
        "learner__learning_rate": 1e-4,
    }
    changes |= {"rollout__max_new_tokens": 64, "rollout__completions_per_prompt": 4, "rollout__slots": 16}
    changes |= {"learner__tokens_per_microbatch": 1024}
    whole_config = config("embedded", tmp_path / "whole", **changes)
    whole = train_quietly(whole_config, roles)
    cfg = config("embedded", tmp_path / "parts", **changes)
    train_quietly(cfg.model_copy(update={"steps": 2}), roles)
    parts = train_quietly(cfg, roles, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name
    histories = [read_history(c.folder / "history").to_pylist() for c in (whole_config, cfg)]
    assert histories[0] == histories[1]
    assert whole.rollouts == parts.rollouts == len(histories[0])
    metrics = read_metrics(cfg.folder)
    assert all(row["selection/groups_kept"] <= row["selection/groups_rolled_out"] for row in metrics)
    assert sum(row["selection/groups_kept"] for row in metrics) > 0


def test_a_damaged_checkpoint_is_passed_over(straight, policy_path, roles, tmp_path):
    source, whole = straight
    cfg = config(policy_path, tmp_path / "copy")
    shutil.copytree(source.folder, cfg.folder)
    victim = cfg.folder / "checkpoints" / "step-000004" / "policy" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    again = train_quietly(cfg, roles, resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_a_checkpoint_of_another_shape_is_refused(straight, policy_path, roles, tmp_path):
    source, _ = straight
    tokenizer = load_tokenizer(policy_path)
    other = policy_config(policy_path)
    other.intermediate_size = 64
    coldstart.save(Policy(other), tokenizer, tmp_path / "other")
    cfg = config(str(tmp_path / "other"), tmp_path / "copy", steps=5)
    shutil.copytree(source.folder, cfg.folder)
    with pytest.raises(InputError, match=r"of another shape: .*mlp"):
        train_quietly(cfg, roles, resume=True)


def test_other_data_is_refused_when_resuming(straight, policy_path, roles, tmp_path):
    source, _ = straight
    cfg = config(policy_path, tmp_path / "copy", data__seed=9, steps=5)
    shutil.copytree(source.folder, cfg.folder)
    with pytest.raises(InputError, match="other samples"):
        train_quietly(cfg, roles, resume=True)


def test_slots_and_workers_do_not_change_the_samples(straight, policy_path, tmp_path, roles):
    source, _ = straight
    cfg = config(policy_path, tmp_path, rollout__slots=64, steps=1)
    train_quietly(cfg, roles)
    columns = ["sample_id", "tokens", "reward"]
    few = read_history(source.folder / "history").select(columns).slice(0, 12)
    assert read_history(cfg.folder / "history").select(columns).equals(few)


def test_engines_that_sleep_while_the_learner_learns_draw_the_same(straight, policy_path, roles, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path / "asleep", rollout__sleep_in_update=True, steps=2)
    seen = []
    each = roles.rollout.each
    monkeypatch.setattr(
        roles.rollout, "each", lambda method, *rest: seen.append((method, *rest[0])) or each(method, *rest)
    )
    train_quietly(cfg, roles)
    assert seen == [("rest", True), ("rest", False)] * 2
    before, after = (read_metrics(folder)[:2] for folder in (straight[0].folder, cfg.folder))
    for awake, asleep in zip(before, after, strict=True):
        assert {k: v for k, v in asleep.items() if k.startswith(("learner/", "reward/"))} == {
            k: v for k, v in awake.items() if k.startswith(("learner/", "reward/"))
        }


def test_held_out_accuracy_is_measured_while_training(straight, policy_path, roles, tmp_path):
    cfg = config(policy_path, tmp_path, evaluation__source="procedural:heldout", evaluation__limit=5,
                 evaluation__every_steps=2, evaluation__temperature=0.0)  # fmt: skip
    result = train_quietly(cfg, roles)
    # Evaluating changes nothing: neither the weights nor what is drawn.
    for name, tensor in weights(straight[1]).items():
        assert torch.equal(tensor, weights(result)[name]), name
    figures = sorted((cfg.folder / "evaluation").glob("*.json"))
    assert [path.name for path in figures] == ["step-000000.json", "step-000002.json", "step-000004.json"]
    measured = {row["step"]: row for row in read_metrics(cfg.folder) if "evaluation/accuracy" in row}
    assert sorted(measured) == [2, 4]
    for step, row in measured.items():
        tree = json.loads((cfg.folder / "evaluation" / f"step-{step:06d}.json").read_text())
        assert row["evaluation/accuracy"] == tree["accuracy"]["mean"]
        assert row["evaluation/low"] <= row["evaluation/accuracy"] <= row["evaluation/high"]
    # The last one is what the checkpoint's policy answers.
    rows = [json.loads(line) for line in (cfg.folder / "evaluation" / "step-000004.jsonl").read_text().splitlines()]
    assert len({row["sample_id"] for row in rows}) == 5


def test_held_out_problems_must_be_named(policy_path, roles, tmp_path):
    with pytest.raises(InputError, match=r"evaluation\.source is not set"):
        train_quietly(config(policy_path, tmp_path, evaluation__every_steps=1), roles)
