"""The learner's optimizers: offloaded equals AdamW bit for bit on a CPU, 8 bits come close to it in float64."""

import importlib.util
import math
import sys

import pytest
import torch

from plumbline.errors import InputError
from plumbline.rl import learner_state, optimizers
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.config import parse_config
from plumbline.rl.distributed import Ranks
from plumbline.rl.learner import Learner
from plumbline.rl.optimizers import HostAdamW, check_optimizer, make_optimizer
from plumbline.rl.plan import make_plan
from plumbline.rl.sections import LearnerSection

BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra adamw-8bit")
PPO = {"advantage": "gae", "kl_coefficient": 0.1, "kl_in": "reward", "kl_estimator": "k1"}
ZCLIP = {"clipping": {"method": "zclip", "warmup_steps": 2}, "minibatches": 2}
ADAGC = {"clipping": {"method": "adagc", "warmup_steps": 1}, "schedule": "linear", "warmup_steps": 2}


def settings(policy_path, optimizer, *, algorithm=None, **learner):
    return parse_config(
        {
            "name": "x",
            "steps": 8,
            "policy": {"path": policy_path, "device": "cpu"},
            "learner": {
                "optimizer": optimizer,
                "learning_rate": 1e-2,
                "weight_decay": 0.1,
                "tokens_per_microbatch": 40,
                **learner,
            },
            "algorithm": algorithm or {},
        }
    )


def make(policy_path, optimizer, **changes):
    return Learner(settings(policy_path, optimizer, **changes), "cpu")


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(10, 290, (length,), generator=generator).tolist() for length in (3, 9, 5, 7)]
    rewards = torch.rand(4, generator=generator).tolist()
    return TrainingBatch([[11, 12]] * 4, rows, [[-5.7] * len(row) for row in rows], rewards, 2)


def everything(learner):
    """Copies of the weights and of what the optimizers keep."""
    return {name: tensor.clone() for name, tensor in learner_state._tensors(learner).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    "changes",
    [ADAGC, {"algorithm": PPO, "minibatches": 2}, {"lora": {"rank": 4}, "precision": "bfloat16"}],
    ids=["adagc, schedule", "critic", "adapters, bfloat16"],
)
def test_offloaded_is_adamw_bit_for_bit(changes, policy_path):
    """Also where a step is skipped for a gradient that is not finite."""
    plain, offloaded = (make(policy_path, name, **changes) for name in ("adamw", "adamw_offload"))
    start = everything(plain)
    for step in range(4):
        for learner in (plain, offloaded):
            clip = learner.clipper.clip
            if step == 2:
                learner.clipper.clip = lambda: torch.tensor(math.nan)
            skipped = learner.update(batch(step))["learner/skipped_steps"]
            assert (skipped > 0) == (step == 2)
            learner.clipper.clip = clip
    after = everything(plain)
    assert_same(after, everything(offloaded))
    assert any(not torch.equal(tensor, after[name]) for name, tensor in start.items())


def test_a_parameter_without_a_gradient_stays():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = HostAdamW(parameters, Ranks(), lr=0.1, weight_decay=0.5)
    for used in ((0, 1), (1,)):
        optimizer.zero_grad()
        for number in used:
            parameters[number].grad = torch.ones(3)
        optimizer.step()
    steps = [optimizer.state[optimizer.copies[parameter]]["step"].item() for parameter in parameters]
    assert steps == [1, 2]
    assert parameters[0][0] > parameters[1][0]


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("adamw_offload", "adamw_offload", ADAGC | {"algorithm": PPO}),
        ("adamw", "adamw_offload", {}),
        ("adamw_offload", "adamw", {}),
        pytest.param("adamw_8bit", "adamw_8bit", ADAGC, marks=BITSANDBYTES),
        pytest.param("adamw_8bit", "adamw_8bit", ZCLIP | {"algorithm": PPO}, marks=BITSANDBYTES),
        pytest.param("adamw_8bit", "adamw_8bit", {"lora": {"rank": 4}}, marks=BITSANDBYTES),
    ],
)
def test_resumed_goes_on_bitwise(before, after, changes, policy_path, tmp_path):
    straight = make(policy_path, before, **changes)
    for step in range(4):
        straight.update(batch(step))
        if step == 1:
            then = everything(straight)
            saving = learner_state.Saving(straight, tmp_path / "saved")  # written while training goes on
    saving.written(wait=True)
    resumed = make(policy_path, after, **changes)
    resumed.update(batch(9))  # what was there before the checkpoint is read leaves nothing behind
    learner_state.load(resumed, tmp_path / "saved")
    assert_same(then, everything(resumed))
    for step in (2, 3):
        resumed.update(batch(step))
    assert_same(everything(straight), everything(resumed))


def against_float64(gradients, shape=(256, 512), steps=30):
    """(distance from a float64 AdamW over the distance it moved, largest single distance) of the 8-bit one."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator) * 0.1
    weights, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    section = LearnerSection(optimizer="adamw_8bit", weight_decay=0.01)
    ours = make_optimizer(section, [weights], 1e-3, Ranks())
    reference = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.01)
    for _ in range(steps):
        weights.grad = gradients(shape, generator)
        exact.grad = weights.grad.double()
        ours.step()
        reference.step()
    assert ours.state[weights]["state1"].dtype == ours.state[weights]["state2"].dtype == torch.uint8
    away = (weights.detach().double() - exact.detach()).abs()
    return (away.norm() / (exact.detach() - start.double()).norm()).item(), away.max().item()


def even(shape, generator):
    return torch.randn(shape, generator=generator)


def rows_of_all_sizes(shape, generator):
    return even(shape, generator) * torch.logspace(-6, 0, shape[0])[:, None]


@BITSANDBYTES
@pytest.mark.parametrize("gradients", [even, rows_of_all_sizes])
def test_8_bits_come_within_a_few_per_cent_of_float64(gradients):
    share, largest = against_float64(gradients)
    assert share < 0.04
    assert largest < 3e-3  # three steps' worth


@BITSANDBYTES
def test_8_bits_round_no_second_moment_to_zero():
    """No gradient is divided by next to nothing because another one of its block is large."""
    section = LearnerSection(optimizer="adamw_8bit")
    weights = torch.nn.Parameter(torch.zeros(4096))
    optimizer = make_optimizer(section, [weights], 1e-3, Ranks())
    gradient = torch.full((4096,), 1e-5)
    gradient[::256] = 1.0
    weights.grad = gradient
    optimizer.step()
    state = optimizer.state[weights]
    kept = state["qmap2"][state["state2"].long()].view(-1, 256) * state["absmax2"][:, None]
    assert kept.min() > 0
    assert state["qmap2"].min() > 0  # bitsandbytes' kernels do not round alike on every device
    weights.grad = gradient * 1e-3
    before = weights.detach().clone()
    optimizer.step()
    assert (weights.detach() - before).abs().max() < 2e-3


@BITSANDBYTES
def test_8_bits_leave_a_tensor_without_gradients_alone():
    weights = torch.nn.Parameter(torch.ones(4096))
    optimizer = make_optimizer(LearnerSection(optimizer="adamw_8bit"), [weights], 1e-3, Ranks())
    for _ in range(3):
        weights.grad = torch.zeros(4096)
        optimizer.step()
    assert torch.equal(weights.detach(), torch.ones(4096))


@BITSANDBYTES
def test_8_bits_train_the_policy_as_32_do(policy_path):
    plain, frugal = (make(policy_path, name, learning_rate=1e-3) for name in ("adamw", "adamw_8bit"))
    start = learner_state.policy_weights(plain)
    start = {name: tensor.clone() for name, tensor in start.items()}
    for step in range(6):
        plain.update(batch(step))
        frugal.update(batch(step))
    exact, close = learner_state.policy_weights(plain), learner_state.policy_weights(frugal)
    moved = math.sqrt(sum((exact[name] - start[name]).square().sum().item() for name in start))
    apart = math.sqrt(sum((exact[name] - close[name]).square().sum().item() for name in start))
    assert 0 < apart < 0.1 * moved
    assert torch.uint8 in {tensor.dtype for tensor in everything(frugal).values()}


@BITSANDBYTES
def test_moments_of_other_bits_are_refused(policy_path, tmp_path):
    learner_state.save(make(policy_path, "adamw"), tmp_path / "saved")
    with pytest.raises(InputError, match=r"moments of 32 bits, learner\.optimizer adamw_8bit of 8"):
        learner_state.load(make(policy_path, "adamw_8bit"), tmp_path / "saved")


@BITSANDBYTES
def test_a_bitsandbytes_that_cannot_run_is_one_line(monkeypatch):
    from bitsandbytes.optim import AdamW8bit

    def refuse(self):
        raise RuntimeError("\nCUDA SETUP failed\nmore of it")

    monkeypatch.setattr(AdamW8bit, "step", refuse)
    with pytest.raises(InputError, match=r"bitsandbytes does not run on cpu: CUDA SETUP failed$"):
        make_optimizer(LearnerSection(optimizer="adamw_8bit"), [torch.nn.Parameter(torch.ones(2))], 1e-3, Ranks())


def test_what_it_lacks_is_one_line(policy_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_optimizer(LearnerSection(optimizer="adamw_offload"))
    with pytest.raises(InputError, match=r"needs bitsandbytes: pip install 'plumbline-rl\[adamw-8bit\]'"):
        make(policy_path, "adamw_8bit")
    with pytest.raises(InputError, match=r"adamw_8bit needs learner\.workers 1, not 2"):
        settings(policy_path, "adamw_8bit", workers=2)
    with pytest.raises(InputError, match=r"learner\.optimizer = 'sgd'"):
        settings(policy_path, "sgd")


def test_the_plan_counts_what_each_takes(policy_path):
    plans = {name: make_plan(settings(policy_path, name)) for name in optimizers.MOMENT_BITS}
    n = plans["adamw"].parameters
    assert plans["adamw"].host == plans["adamw_8bit"].host == 0
    assert plans["adamw"].learner - plans["adamw_offload"].learner == 8 * n
    assert plans["adamw_offload"].host == 16 * n
    saved = (plans["adamw"].learner - plans["adamw_8bit"].learner) / n
    assert 5.9 < saved < 6
    assert plans["adamw"].checkpoint - plans["adamw_8bit"].checkpoint == pytest.approx(saved * n, abs=1)
    assert plans["adamw_offload"].checkpoint == plans["adamw"].checkpoint
    critic = make_plan(settings(policy_path, "adamw_offload", algorithm={"advantage": "gae"}))
    assert critic.host == 32 * n
    adapters = make_plan(settings(policy_path, "adamw_offload", lora={"rank": 4}))
    assert adapters.host == 0
    half = settings(policy_path, "adamw")
    half.rollout.precision = "bfloat16"
    # Published weights lie on the learner's device in the engine's precision.
    assert plans["adamw"].learner - make_plan(half).learner == 2 * n
