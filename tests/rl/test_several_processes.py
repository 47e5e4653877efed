"""Two learner, two rollout and two reward processes on this machine's CPU equal one of each, to rounding."""

import math

import pytest
import ray
import torch
from rich.console import Console

from plumbline.models.load import load_policy
from plumbline.rl import learner_state
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.learner import Learner
from plumbline.rl.loop import train
from plumbline.rl.tasks import training_tasks
from plumbline.rl.telemetry import read_metrics
from plumbline.rl.text import Codec
from plumbline.selection.history import read_history
from plumbline.testing import random_batch, save_random_policy

# Short blocks, so that some sequences have several and others none.
NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 3, "window": 8, "phi": "mlp"}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def policies(policy_path, tmp_path_factory):
    """Folders of random policies: full attention with tied and with untied embeddings, and NSA."""
    folders = {}
    for name, changes in {
        "full": {"attention": "full"},
        "untied": {"attention": "full", "tie_word_embeddings": False, "qkv_bias": True, "qk_norm": True},
        "nsa": {"attention": "nsa", "nsa": NSA},
    }.items():
        folders[name] = save_random_policy(tmp_path_factory.mktemp(name), policy_path, **SHAPE, **changes)
    return folders


def config(policy, *, workers, output=None, algorithm=None, learner=None, **changes):
    return parse_config(
        {
            "name": "several",
            "output": output,
            "seed": 3,
            "steps": 3,
            "policy": {"path": policy, "device": "cpu"},
            "data": {"source": "procedural:train", "limit": 10},
            "rollout": {
                "workers": workers,
                "prompts_per_step": 4,
                "completions_per_prompt": 3,
                "max_new_tokens": 12,
                "slots": 6,
                "threads_per_worker": 1,
                "cpus_per_worker": 0.1,
            },
            "learner": {
                "workers": workers,
                "learning_rate": 1e-3,
                "tokens_per_microbatch": 40,
                "threads": 1,
                "cpus": 0.1,
                **(learner or {}),
            },
            "reward": {
                "workers": workers,
                "cpus_per_worker": 0.1,
                "shaping": "plumbline.testing:short_is_good",
                "checking": {"share": 0},
            },
            "algorithm": algorithm or {},
            "ray": {"dashboard": False},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def roles(policies):
    with Roles.start(config(policies["full"], workers=2)) as roles:
        yield roles


def in_one(cfg, batches):
    """(metrics of every step, weights before, weights after) of a learner in this process."""
    learner = Learner(cfg, "cpu")
    before = {name: tensor.clone() for name, tensor in learner_state.policy_weights(learner).items()}
    metrics = [learner.update(batch) for batch in batches]
    return metrics, before, learner_state.policy_weights(learner)


def in_two(roles, cfg, batches):
    """(metrics of every step, weights after) of the cluster's two learner processes, which must agree on the metrics."""
    ray.get([learner.begin.remote(cfg) for learner in roles.learners])
    metrics = []
    for batch in batches:
        first, second = ray.get([learner.update.remote(batch) for learner in roles.learners], timeout=300)
        for each in (first, second):
            assert each.pop("time/update_seconds") > 0
        assert first == second
        metrics.append(first)
    ray.get([learner.publish.remote() for learner in roles.learners])
    arrays = ray.get(roles.learners[0].arrays.remote())
    return metrics, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def assert_equal(one, two, tolerance=1e-4):
    """Metrics to `tolerance`, and weights to that share of the distance they moved."""
    metrics, before, after = one
    for step, (a, b) in enumerate(zip(metrics, two[0], strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), (step, name)
        assert math.isfinite(a["learner/gradient_norm"])
    assert distance(after, two[1]) < tolerance * distance(before, after)


def distance(first, second):
    assert first.keys() == second.keys()
    return math.sqrt(sum((first[name] - second[name]).square().sum().item() for name in first))


GRPO = {"kl_coefficient": 0.05, "entropy_coefficient": 0.01}
PPO = {
    "advantage": "gae",
    "kl_coefficient": 0.05,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "critic": {"learning_rate": 1e-3},
}
ADAGC = {"method": "adagc", "max_norm": 0.01, "warmup_steps": 1}
ZCLIP = {"method": "zclip", "max_norm": 0.01, "warmup_steps": 2, "threshold": 0.1}
CASES = {
    "accumulation, global clip": ("full", GRPO, {"minibatches": 2, "epochs": 2, "clipping": {"max_norm": 0.01}}),
    "fewer microbatches than processes": ("full", {}, {"tokens_per_microbatch": 4096}),
    "untied, sequence means, zclip, checkpointed": (
        "untied",
        {"aggregation": "sequence", "correction": {"method": "truncate"}},
        {"gradient_checkpointing": True, "clipping": ZCLIP},
    ),
    "adapters": ("full", GRPO, {"lora": {"rank": 4}}),
    "critic": ("full", PPO, {"minibatches": 2}),
    "nsa, adagc": ("nsa", GRPO, {"minibatches": 2, "clipping": ADAGC}),
    "nsa, critic, checkpointed": ("nsa", PPO, {"gradient_checkpointing": True}),
    "nsa, adapters": ("nsa", {}, {"lora": {"rank": 4}}),
    "offloaded, critic": ("untied", PPO, {"optimizer": "adamw_offload", "weight_decay": 0.1, "minibatches": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_learners_equal_one(case, policies, roles):
    policy, algorithm, learner = CASES[case]
    batches = [random_batch(seed) for seed in range(3)]
    one = in_one(config(policies[policy], workers=1, algorithm=algorithm, learner=learner), batches)
    two = in_two(roles, config(policies[policy], workers=2, algorithm=algorithm, learner=learner), batches)
    assert_equal(one, two)


@pytest.mark.parametrize("policy", ["full", "nsa"])
def test_bfloat16_differs_by_its_rounding_alone(policy, policies, roles):
    batches = [random_batch(seed) for seed in range(2)]
    half = {"precision": "bfloat16"}
    one = in_one(config(policies[policy], workers=1, learner=half), batches)
    two = in_two(roles, config(policies[policy], workers=2, learner=half), batches)
    # AdamW's first steps turn the rounding of a small gradient into a whole step.
    assert_equal(([], *one[1:]), ([], two[1]), 0.3)
    for a, b in zip(one[0], two[0], strict=True):
        assert b["learner/loss"] == pytest.approx(a["learner/loss"], abs=5e-3)
        assert b["learner/gradient_norm"] == pytest.approx(a["learner/gradient_norm"], rel=0.02)


@pytest.mark.parametrize("policy", ["full", "nsa"])
def test_lengths_too_unlike_to_be_padded_together(policy, policies, roles):
    """One process runs such a microbatch in two passes; sharded layers must run as often on every rank."""
    lengths = [1100, 1, 2, 3]
    batches = [random_batch(0, extra=lengths)]
    one = in_one(config(policies[policy], workers=1, learner={"tokens_per_microbatch": 1300}), batches)
    two = in_two(roles, config(policies[policy], workers=2, learner={"tokens_per_microbatch": 1300}), batches)
    assert_equal(one, two)


def test_no_sequence_of_a_block(policies, roles):
    """phi then takes part in nothing, on any rank; AdamW's step of it is the same however many there are."""
    batches = [random_batch(0), random_batch(1, longest=3), random_batch(2)]
    one = in_one(config(policies["nsa"], workers=1), batches)
    two = in_two(roles, config(policies["nsa"], workers=2), batches)
    assert_equal(one, two)


@pytest.fixture(scope="module")
def alone(policies, roles):
    with Roles.start(config(policies["full"], workers=1)) as alone:
        yield alone


@pytest.mark.parametrize(("policy", "algorithm"), [("full", GRPO), ("nsa", GRPO), ("nsa", PPO)])
def test_a_run_of_two_of_each_role_equals_one_of_one(policy, algorithm, policies, roles, alone, tmp_path):
    metrics, after = [], []
    for name, actors, workers in (("one", alone, 1), ("two", roles, 2)):
        cfg = config(policies[policy], workers=workers, output=str(tmp_path / name), algorithm=algorithm)
        tasks, _ = training_tasks(cfg, Codec(cfg.policy.path))
        cfg.folder.mkdir()
        result = train(cfg, actors, tasks, Console(quiet=True))
        metrics.append(read_metrics(cfg.folder))
        after.append(load_policy(result.policy, dtype=torch.float32).state_dict())
    histories = [read_history(tmp_path / name / "history").to_pylist() for name in ("one", "two")]
    assert [row["reward"] for row in histories[0]] == [row["reward"] for row in histories[1]]
    assert len({row["reward"] for row in histories[0]}) > 3
    for a, b in zip(*metrics, strict=True):
        for key in a.keys() & b.keys():
            if key.startswith(("learner/", "reward/")):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
        assert a["learner/gradient_norm"] > 0
    before = load_policy(policies[policy], dtype=torch.float32).state_dict()
    assert distance(*after) < 1e-3 * distance(before, after[0])


def trained(roles, cfg, batches, folder, *, load=None):
    """Train the actors on batches, from a checkpoint if there is one, and save; their whole policy."""
    ray.get([learner.begin.remote(cfg) for learner in roles.learners])
    if load is not None:
        ray.get([learner.load.remote(str(load)) for learner in roles.learners])
    for batch in batches:
        ray.get([learner.update.remote(batch) for learner in roles.learners], timeout=300)
    ray.get([learner.save.remote(str(folder)) for learner in roles.learners])
    parts = ray.get([learner.written.remote(True) for learner in roles.learners])
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    # Every file is summed, and by one process.
    assert sorted(name for part in parts for name in part) == names
    return load_policy(str(folder / "policy"), dtype=torch.float32).state_dict()


@pytest.mark.parametrize("case", ["ppo, adagc", "nsa, adapters", "offloaded"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(case, policies, roles, alone, tmp_path):
    policy, algorithm, learner = {
        "ppo, adagc": ("full", PPO, {"clipping": ADAGC, "warmup_steps": 3}),
        "nsa, adapters": ("nsa", {}, {"lora": {"rank": 4}, "warmup_steps": 3}),
        "offloaded": ("nsa", {}, {"optimizer": "adamw_offload", "warmup_steps": 3}),
    }[case]
    one, two = (config(policies[policy], workers=n, algorithm=algorithm, learner=learner) for n in (1, 2))
    first, last = [random_batch(0), random_batch(1)], [random_batch(2), random_batch(3)]
    straight = trained(alone, one, first + last, tmp_path / "straight")
    trained(roles, two, first, tmp_path / "two")
    trained(alone, one, first, tmp_path / "one")
    fewer = trained(alone, one, last, tmp_path / "fewer", load=tmp_path / "two")
    more = trained(roles, two, last, tmp_path / "more", load=tmp_path / "one")
    before = load_policy(policies[policy], dtype=torch.float32).state_dict()
    for after in (fewer, more):
        assert distance(after, straight) < 1e-4 * distance(before, straight)
