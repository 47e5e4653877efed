"""The learner's optimizers on a GPU: what they keep there, and that they step as AdamW does."""

import pytest
import torch

from plumbline.rl.distributed import Ranks
from plumbline.rl.optimizers import make_optimizer
from plumbline.rl.sections import LearnerSection

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(4096, 1024), (1000, 333), (1024,), (3,)]
COUNT = sum(torch.Size(shape).numel() for shape in SHAPES)


def start():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]


def gradients(step):
    """Within a block they differ by many orders of magnitude, from step to step too."""
    generator = torch.Generator().manual_seed(1 + step)
    return [
        torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator) ** 3 + 0.3 * before
        for shape, before in zip(SHAPES, start(), strict=True)
    ]


def train(optimizer, steps=30):
    """(final weights, bytes kept on the device, the optimizer) after steps at a falling learning rate."""
    parameters = [torch.nn.Parameter(tensor.cuda()) for tensor in start()]
    before = torch.cuda.memory_allocated()
    section = LearnerSection(optimizer=optimizer, weight_decay=0.01)
    stepper = make_optimizer(section, parameters, 1e-3, Ranks())
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / 60)
    for step in range(steps):
        stepper.zero_grad(set_to_none=True)
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.cuda()
        stepper.step()
        schedule.step()
    stepper.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    return [parameter.detach() for parameter in parameters], kept, stepper


def test_offloaded_keeps_nothing_on_the_gpu_and_steps_as_adamw():
    plain, kept, _ = train("adamw")
    assert kept >= 8 * COUNT
    offloaded, kept, optimizer = train("adamw_offload")
    assert kept < 0.01 * COUNT
    assert all(buffer.is_pinned() for buffer in optimizer.weights + optimizer.gradients)
    for one, other in zip(plain, offloaded, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_8_bits_come_within_a_few_per_cent_of_float64():
    pytest.importorskip("bitsandbytes")
    close, kept, _ = train("adamw_8bit")
    assert kept < 2.2 * COUNT
    exact = [torch.nn.Parameter(tensor.double()) for tensor in start()]
    reference = torch.optim.AdamW(exact, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 - step / 60)
    for step in range(30):
        for parameter, gradient in zip(exact, gradients(step), strict=True):
            parameter.grad = gradient.double()
        reference.step()
        schedule.step()
    for before, one, other in zip(start(), exact, close, strict=True):
        away = (other.cpu().double() - one.detach()).abs()
        assert away.norm() < 0.05 * (one.detach() - before.double()).norm()
        assert away.max() < 8e-3  # steps are of 1e-3; a second moment rounded to 0 would make one of thousands


@pytest.mark.parametrize("name", ["adamw_offload", "adamw_8bit"])
def test_a_learner_goes_on_from_a_checkpoint(name, tmp_path):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    from plumbline.rl import learner_state
    from plumbline.rl.batch import TrainingBatch
    from plumbline.rl.config import parse_config
    from plumbline.rl.learner import Learner

    settings = {"optimizer": name, "learning_rate": 1e-3, "precision": "bfloat16", "clipping": {"method": "adagc"}}
    config = parse_config({"name": "x", "policy": {"path": "embedded"}, "learner": settings})
    rows = [list(range(20, 40)), list(range(50, 80)), list(range(90, 99)), [10, 11]]
    batch = TrainingBatch([[11, 12]] * 4, rows, [[-5.7] * len(row) for row in rows], [1.0, 0.0, 0.5, 0.2], 2)
    straight, resumed = Learner(config, "cuda"), Learner(config, "cuda")
    start = {name: tensor.clone() for name, tensor in learner_state.policy_weights(straight).items()}
    straight.update(batch)
    learner_state.save(straight, tmp_path)
    learner_state.load(resumed, tmp_path)
    for name, tensor in learner_state._tensors(straight).items():
        assert torch.equal(tensor, learner_state._tensors(resumed)[name]), name
    straight.update(batch)
    resumed.update(batch)
    other = learner_state.policy_weights(resumed)
    for name, tensor in learner_state.policy_weights(straight).items():
        # Kernels that add up in any order, and AdamW's first steps, which turn that into whole ones.
        assert (tensor - other[name]).norm() <= 0.2 * (tensor - start[name]).norm() + 1e-6, name
