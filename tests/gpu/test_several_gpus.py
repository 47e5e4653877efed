"""Two GPUs of one machine: learners over NCCL equal one, and engines get their weights from the learner beside them."""

import math

import pytest
import ray
import torch

from plumbline.rl import learner_state
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.learner import Learner
from plumbline.testing import random_batch, save_random_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings("ignore"),
]

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 3, "window": 8}
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    kinds = {"full": {"attention": "full"}, "nsa": {"attention": "nsa", "nsa": NSA}}
    return {
        name: save_random_policy(tmp_path_factory.mktemp(name), "embedded", **SHAPE, **changes)
        for name, changes in kinds.items()
    }


def config(policy, *, workers=2, share=0.5, precision="float32"):
    return parse_config(
        {
            "name": "several_gpus",
            "steps": 3,
            "policy": {"path": policy, "device": "cuda"},
            "rollout": {"workers": workers, "gpus_per_worker": share, "precision": precision, "slots": 8},
            "learner": {
                "workers": workers,
                "gpus": share,
                "precision": precision,
                "learning_rate": 1e-3,
                "tokens_per_microbatch": 150,
                "minibatches": 2,
            },
            "algorithm": {"kl_coefficient": 0.05, "entropy_coefficient": 0.01},
            "ray": {"dashboard": False},
        }
    )


@pytest.fixture(scope="module")
def roles(policies):
    with Roles.start(config(policies["full"])) as roles:
        yield roles


def batch(seed):
    return random_batch(seed, prompt=20, longest=60)


def distance(first, second):
    return math.sqrt(sum((first[name].cpu() - second[name].cpu()).square().sum().item() for name in first))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["full", "nsa"])
def test_two_learners_over_nccl_equal_one(policy, precision, policies, roles):
    run, batches = config(policies[policy], precision=precision), [batch(seed) for seed in range(3)]
    learner = Learner(config(policies[policy], workers=1, precision=precision), "cuda:0")
    before = {name: tensor.clone() for name, tensor in learner_state.policy_weights(learner).items()}
    exact = precision == "float32"
    roles.begin(run)
    for each in batches:
        one = learner.update(each)
        two = roles.update(each)()
        for name in ("learner/loss", "learner/gradient_norm", "learner/entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-3 if exact else 0.05, abs=1e-4 if exact else 1e-2), name
    roles.sync()
    arrays = ray.get(roles.learners[0].arrays.remote())
    after = learner_state.policy_weights(learner)
    two_after = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if not exact:
        two_after = {name: tensor.view(torch.bfloat16).float() for name, tensor in two_after.items()}
    # AdamW's first steps turn the rounding of a small gradient into a whole step.
    assert distance(after, two_after) < (0.02 if exact else 0.4) * distance(before, after)


def test_each_engine_maps_the_weights_of_the_learner_on_its_gpu(policies, roles):
    roles.begin(config(policies["nsa"]))
    roles.update(batch(0))()
    version = roles.sync()  # compares the checksum of every engine's weights with the first learner's
    cards = [roles.cards[place.name][0] for place in [*roles.learners.places, *roles.rollout.places]]
    assert cards[:2] == cards[2:]
    assert len(set(cards)) == 2
    assert roles.published["arrays"] is None  # nothing went over the host
    # One that is replaced comes back to its GPU, and to its learner's weights.
    roles.rollout.replace(1, roles.rollout[1], "a test")
    assert roles.cards[roles.rollout.places[1].name][0] == cards[1]
    prompts = [Prompt(i, str(i), [20 + i, 30, 40], "", "1") for i in range(4)]
    groups = list(roles.graded_groups(prompts, 2, Sampling(8, 1.0, seed=0)))
    assert {group.policy_version for group in groups} == {version}
    assert len(groups) == 4


def test_an_engine_on_a_gpu_of_its_own_gets_them_too(policies, roles):
    roles.close()
    run = config(policies["full"], workers=1, share=1, precision="bfloat16")
    with Roles.start(run) as apart:
        apart.begin(run)
        apart.update(batch(0))()
        apart.sync()
        [learner], engine = (apart.cards[pool.places[0].name] for pool in (apart.learners, apart.rollout))
        assert engine[0] != learner
        assert engine[1] == learner  # which it sees, to read from
        assert apart.published["arrays"] is None
        # As if it were on another machine: through the host.
        apart.cards[apart.rollout.places[0].name] = engine[:1]
        apart.update(batch(1))()
        apart.sync()
        assert apart.published["arrays"] is not None
