"""The learner without Ray: adapters, clipping, checkpoints, the critic."""

import math

import pytest
import torch

from plumbline.errors import InputError
from plumbline.models.load import load_policy
from plumbline.rl import learner_state
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.config import parse_config
from plumbline.rl.experience import estimate_advantages
from plumbline.rl.learner import Learner
from plumbline.rl.packing import completion_mask
from plumbline.rl.zclip import ZScoreClipper


def make(policy_path, *, algorithm=None, **learner):
    tree = {
        "name": "learner",
        "policy": {"path": policy_path, "device": "cpu"},
        "rollout": {"max_new_tokens": 12},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 40, **learner},
        "algorithm": algorithm or {},
    }
    return Learner(parse_config(tree), "cpu")


def batch(seed=0, groups=3, size=2):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(10, 290, (length,), generator=generator).tolist()

    prompts = [prompt for _ in range(groups) for prompt in [draw(2, 6)] * size]
    completions = [draw(1, 12) for _ in prompts]
    logprobs = [[-5.7] * len(ids) for ids in completions]
    rewards = torch.rand(len(prompts), generator=generator).tolist()
    return TrainingBatch(prompts, completions, logprobs, rewards, size)


def tensors(learner):
    return {name: tensor.clone() for name, tensor in learner_state.policy_weights(learner).items()}


def test_adapters_train_alone_and_merge_exactly(policy_path):
    learner = make(policy_path, lora={"rank": 4, "alpha": 8.0})
    before = load_policy(policy_path, dtype=torch.float32)
    start = tensors(learner)
    assert start.keys() == dict(before.named_parameters()).keys()
    for name, tensor in before.named_parameters():
        assert torch.equal(start[name], tensor), name  # B starts at zero
    learner.update(batch())
    learner.update(batch(1))
    merged = tensors(learner)
    moved = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert moved
    assert all("_proj" in name for name in moved)
    ids, ends = torch.arange(10, 30), torch.tensor([0, 20], dtype=torch.int32)
    plain = load_policy(policy_path, dtype=torch.float32)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(plain(ids, ends), learner.policy(ids, ends))


def test_with_adapters_the_reference_is_the_policy_without_them(policy_path):
    settings = {"kl_coefficient": 0.1}
    learner = make(policy_path, algorithm=settings, lora={"rank": 4})
    learner.update(batch())
    first = learner.prepare(batch(1)).reference_logprobs
    untouched = make(policy_path, algorithm=settings).prepare(batch(1)).reference_logprobs
    torch.testing.assert_close(first, untouched)


@pytest.mark.parametrize(
    "settings",
    [
        {"learner": {"clipping": {"method": "adagc", "warmup_steps": 1}}},
        {"learner": {"clipping": {"method": "zclip", "warmup_steps": 2}}},
        {"learner": {"lora": {"rank": 4}}, "algorithm": {"kl_coefficient": 0.1}},
        {"algorithm": {"advantage": "gae", "kl_coefficient": 0.1, "kl_in": "reward", "kl_estimator": "k1"}},
    ],
    ids=["adagc", "zclip", "lora", "ppo"],
)
def test_saved_and_loaded_goes_on_bitwise(settings, policy_path, tmp_path):
    def fresh():
        return make(policy_path, algorithm=settings.get("algorithm"), **settings.get("learner", {}))

    straight = fresh()
    for step in range(4):
        straight.update(batch(step))
        if step == 1:
            learner_state.save(straight, tmp_path / "saved")
    resumed = fresh()
    learner_state.load(resumed, tmp_path / "saved")
    for step in (2, 3):
        resumed.update(batch(step))
    for name, tensor in tensors(straight).items():
        assert torch.equal(tensor, tensors(resumed)[name]), name
    assert resumed.version == 4
    if straight.critic is not None:
        for name, tensor in straight.critic.state_dict().items():
            assert torch.equal(tensor, resumed.critic.state_dict()[name]), name


def test_a_checkpoint_of_other_settings_is_refused(policy_path, tmp_path):
    learner_state.save(make(policy_path), tmp_path / "saved")
    with pytest.raises(InputError, match="without adapters"):
        learner_state.load(make(policy_path, lora={"rank": 2}), tmp_path / "saved")
    with pytest.raises(InputError, match="without critic"):
        learner_state.load(make(policy_path, algorithm={"advantage": "gae"}), tmp_path / "saved")
    with pytest.raises(InputError, match="clipping"):
        learner_state.load(make(policy_path, clipping={"method": "adagc"}), tmp_path / "saved")


def test_an_unknown_adapter_target_is_one_line(policy_path):
    with pytest.raises(InputError, match="targets names no layer: 'w_proj'"):
        make(policy_path, lora={"rank": 2, "targets": ["w_proj"]})


def test_gradient_checkpointing_changes_nothing(policy_path):
    plain, frugal = make(policy_path), make(policy_path, gradient_checkpointing=True)
    plain.update(batch())
    frugal.update(batch())
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(frugal)[name], tensor)


def test_bfloat16_keeps_float32_masters(policy_path):
    learner = make(policy_path, precision="bfloat16")
    metrics = learner.update(batch())
    assert math.isfinite(metrics["learner/gradient_norm"])
    assert {tensor.dtype for tensor in tensors(learner).values()} == {torch.float32}
    exact = make(policy_path)
    assert metrics["learner/loss"] == pytest.approx(exact.update(batch())["learner/loss"], abs=0.02)


def test_the_critic_learns_the_returns(policy_path):
    learner = make(policy_path, algorithm={"advantage": "gae", "critic": {"learning_rate": 1e-2, "clip": None}})
    losses = [learner.update(batch())["learner/critic_loss"] for _ in range(30)]
    assert losses[-1] < losses[0] / 5
    assert learner.prepare(batch()).values.abs().max() > 0.1


def test_kl_in_the_reward_of_whole_completions():
    algorithm = parse_config({"name": "x", "algorithm": {"advantage": "rloo", "kl_coefficient": 0.5}}).algorithm
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mask = completion_mask([2, 3], "cpu")
    divergence = torch.tensor([[0.2, 0.4, 9.0], [0.1, 0.0, 0.3]], dtype=torch.float64)
    advantages, returns = estimate_advantages(algorithm, rewards, 2, mask, divergence)
    first, second = 1 - 0.5 * 0.6, 0 - 0.5 * 0.4
    torch.testing.assert_close(advantages[:, 0], torch.tensor([first - second, second - first], dtype=torch.float64))
    assert returns is None


def test_zclip_against_a_loop_over_its_formula():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    clipper = ZScoreClipper([weight], max_norm=10.0, threshold=2.0, alpha=0.9, warmup_steps=3)
    norms = [1.0, 1.2, 0.9, 1.1, 50.0, 1.0, float("nan"), 1.3]
    seen, mean, variance = [], None, None
    for norm in norms:
        weight.grad = torch.tensor([norm, 0, 0], dtype=torch.float64)
        clipper.clip()
        if math.isnan(norm):
            continue
        expected = norm
        if len(seen) < 3:
            seen.append(norm)
            if len(seen) == 3:
                mean = sum(seen) / 3
                variance = sum((x - mean) ** 2 for x in seen) / 3
        else:
            z = (norm - mean) / math.sqrt(variance)
            if z > 2:
                expected = mean + 4 / z * math.sqrt(variance)
            mean = 0.9 * mean + 0.1 * expected
            variance = 0.9 * variance + 0.1 * (expected - mean) ** 2
        assert weight.grad[0].item() == pytest.approx(expected)
    assert clipper.mean == pytest.approx(mean)
