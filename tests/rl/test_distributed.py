"""Two learner, two rollout and two reward processes give what one of each gives; a checkpoint of two resumes in one."""

import pytest
import torch
from rich.console import Console

from plumbline.models.load import load_policy
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.loop import train
from plumbline.rl.tasks import training_tasks
from plumbline.rl.telemetry import read_metrics
from plumbline.rl.text import Codec
from plumbline.selection.history import read_history


def config(policy_path, output, workers, steps):
    return parse_config(
        {
            "name": "several",
            "output": str(output),
            "seed": 3,
            "steps": steps,
            "policy": {"path": policy_path, "device": "cpu"},
            "data": {"source": "procedural:train", "limit": 10},
            "rollout": {
                "workers": workers,
                "threads_per_worker": 1,
                "prompts_per_step": 4,
                "completions_per_prompt": 3,
                "max_new_tokens": 6,
                "slots": 6,
            },
            # Little enough that rounding cannot change which tokens are drawn; microbatches do not divide evenly.
            "learner": {"workers": workers, "threads": 1, "learning_rate": 1e-4, "tokens_per_microbatch": 64,
                        "clipping": {"method": "adagc", "warmup_steps": 1}},
            "algorithm": {"advantage": "gae", "kl_coefficient": 0.05, "kl_in": "reward", "kl_estimator": "k1"},
            "reward": {"workers": workers, "shaping": "plumbline.testing:short_is_good"},
            "checkpoint": {"every_steps": 2, "keep": 3},
            "ray": {"dashboard": False},
        }
    )  # fmt: skip


def run(cfg, *, resume=False):
    tasks, _ = training_tasks(cfg, Codec(cfg.policy.path, overrides=cfg.prompt))
    cfg.folder.mkdir(parents=True, exist_ok=True)
    with Roles.start(cfg) as roles:
        return train(cfg, roles, tasks, Console(quiet=True), resume=resume)


def weights(result):
    return load_policy(result.policy, dtype=torch.float32).state_dict()


def test_two_of_each_equal_one_and_reshard(policy_path, tmp_path):
    one = run(config(policy_path, tmp_path / "one", 1, 4))
    run(config(policy_path, tmp_path / "two", 2, 2))
    mixed = run(config(policy_path, tmp_path / "two", 1, 4), resume=True)
    alone, together = (read_history(tmp_path / name / "history").to_pylist() for name in ("one", "two"))
    assert [row["reward"] for row in alone] == [row["reward"] for row in together]
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for name in ("learner/loss", "learner/gradient_norm", "learner/critic_loss", "learner/kl_reference"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    start = load_policy(policy_path, dtype=torch.float32).state_dict()
    ours, theirs = weights(one), weights(mixed)
    for name, tensor in ours.items():
        # AdamW turns rounding in a gradient near zero into a step of full size; hence a share of the way moved.
        way = (tensor - start[name]).norm()
        assert (theirs[name] - tensor).norm() <= 1e-2 * way + 1e-9, name
