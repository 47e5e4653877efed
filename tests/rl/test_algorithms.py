"""Every algorithm's config trains the embedded policy for two steps, through the whole loop."""

from pathlib import Path

import pytest
import torch

from plumbline.models.load import load_policy
from plumbline.rl.cluster import Roles
from plumbline.rl.config import load_config
from plumbline.rl.telemetry import read_metrics
from plumbline.selection.history import read_history
from plumbline.testing import train_quietly

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "algorithms").glob("*.yaml"))
TINY = [
    "steps=2",
    "data.limit=24",
    "data.families=[addition, multiplication]",
    "rollout.prompts_per_step=4",
    "rollout.completions_per_prompt=4",
    "rollout.max_new_tokens=24",
    "rollout.slots=16",
    "rollout.threads_per_worker=1",
    "learner.threads=1",
    "learner.warmup_steps=0",
    "checkpoint.every_steps=0",
    "ray.dashboard=false",
    "policy.device=cpu",
]


@pytest.fixture(scope="module")
def roles(tmp_path_factory):
    overlong = [*TINY, "reward.shaping=dapo_overlong", "reward.overlong_buffer_tokens=8"]
    config = load_config(CONFIGS[0], [*overlong, f"output={tmp_path_factory.mktemp('cluster')}"])
    with Roles.start(config) as roles:
        yield roles


def run(path, roles, output, *overrides):
    config = load_config(path, [*TINY, f"output={output}", *overrides])
    result = train_quietly(config, roles)
    return result, read_metrics(config.folder), config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(path, roles, tmp_path):
    result, metrics, config = run(path, roles, tmp_path)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["learner/skipped_steps"] == 0
        assert row["learner/gradient_norm"] >= 0
    assert any(row["learner/gradient_norm"] > 0 for row in metrics)
    start = load_policy("embedded", dtype=torch.float32).state_dict()
    end = load_policy(result.policy, dtype=torch.float32).state_dict()
    assert any(not torch.equal(start[name], end[name]) for name in start)
    rows = read_history(config.folder / "history").to_pylist()
    assert len(rows) == result.rollouts
    algorithm = config.algorithm
    if algorithm.advantage == "gae":
        assert "learner/critic_loss" in metrics[0]
        assert metrics[0]["learner/critic_gradient_norm"] > 0
    if algorithm.kl_coefficient:
        # The first step starts at the reference.
        assert metrics[0]["learner/kl_reference"] == pytest.approx(0, abs=0.02)
    # The module's reward worker shapes as dapo_overlong: what lies below +-1 comes from the overlong penalty alone.
    assert all((row["reward"] < 2 * row["correct"] - 1) == (row["tokens"] > 16) for row in rows)


@pytest.mark.parametrize("method", ["truncate", "mask"])
def test_correction_and_entropy_bonus(method, roles, tmp_path):
    path = next(path for path in CONFIGS if path.stem == "grpo")
    overrides = [f"algorithm.correction.method={method}", "algorithm.entropy_coefficient=0.01"]
    _, metrics, _ = run(path, roles, tmp_path, *overrides)
    # One machine, one precision: the learner's log-probabilities are the rollout's.
    assert metrics[0]["learner/correction_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics[0]["learner/correction_zeroed"] == 0
