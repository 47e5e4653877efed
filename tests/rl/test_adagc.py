"""AdaGC against the algorithm of arXiv 2502.11034 written as a loop over floats."""

import math

import pytest
import torch
from torch import nn

from plumbline.rl.adagc import AdaptiveGradientClipper


def by_hand(gradients, lambda_abs, lambda_rel, beta, warmup):
    gamma, clipped = {}, []
    for step, grads in enumerate(gradients):
        norms = {name: math.sqrt(sum(x * x for x in grad)) for name, grad in grads.items()}
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        out = {}
        for name, grad in grads.items():
            if step < warmup:
                h = min(1.0, lambda_abs / total)
                out[name] = [h * x for x in grad]
                norm = h * norms[name]
                gamma[name] = min(gamma.get(name, norm), norm)
            else:
                h = min(1.0, lambda_rel * gamma[name] / norms[name])
                out[name] = [h * x for x in grad]
                gamma[name] = beta * gamma[name] + (1 - beta) * h * norms[name]
        clipped.append(out)
    return clipped, gamma


def make(seed=0):
    torch.manual_seed(seed)
    return {
        "a": nn.Parameter(torch.zeros(4, dtype=torch.float64)),
        "b": nn.Parameter(torch.zeros(3, dtype=torch.float64)),
    }


def test_matches_the_algorithm_and_resumes_from_its_state():
    parameters = make()
    gradients = [
        {n: (torch.randn_like(p) * (10 if s == 7 else 1)).tolist() for n, p in parameters.items()} for s in range(12)
    ]
    expected, gamma = by_hand(gradients, 1.0, 1.05, 0.9, 4)
    clipper = AdaptiveGradientClipper(parameters.items(), 1.0, 1.05, 0.9, 4)
    for step, grads in enumerate(gradients):
        if step == 6:
            state = clipper.state_dict()
            clipper = AdaptiveGradientClipper(parameters.items(), 1.0, 1.05, 0.9, 4)
            clipper.load_state_dict(state)
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(grads[name], dtype=torch.float64)
        clipper.clip()
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter.grad, torch.tensor(expected[step][name], dtype=torch.float64), rtol=1e-5, atol=1e-7
            )
    for name in parameters:
        assert clipper.gamma[name].item() == pytest.approx(gamma[name], rel=1e-5)


def test_a_zero_gradient_in_warmup_does_not_freeze_the_tensor():
    parameters = make()
    clipper = AdaptiveGradientClipper(parameters.items(), warmup_steps=2)
    for step in range(5):
        parameters["a"].grad = (
            torch.zeros(4, dtype=torch.float64) if step == 0 else torch.full((4,), 0.1, dtype=torch.float64)
        )
        parameters["b"].grad = torch.full((3,), 0.1, dtype=torch.float64)
        clipper.clip()
    assert parameters["a"].grad.norm() > 0.15


def test_first_gradient_after_warmup_sets_gamma():
    parameters = make()
    clipper = AdaptiveGradientClipper(parameters.items(), warmup_steps=1)
    parameters["a"].grad = torch.ones(4, dtype=torch.float64)
    clipper.clip()
    parameters["b"].grad = torch.full((3,), 2.0, dtype=torch.float64)
    clipper.clip()
    torch.testing.assert_close(parameters["b"].grad, torch.full((3,), 2.0, dtype=torch.float64))


def test_a_nan_changes_nothing_and_is_returned():
    parameters = make()
    clipper = AdaptiveGradientClipper(parameters.items(), warmup_steps=0)
    parameters["a"].grad = torch.tensor([1.0, float("nan"), 0, 0], dtype=torch.float64)
    parameters["b"].grad = torch.ones(3, dtype=torch.float64)
    assert not torch.isfinite(clipper.clip())
    assert clipper.step == 0
    assert clipper.gamma == {}
    assert (parameters["b"].grad == 1).all()


@pytest.mark.parametrize("bad", [{"lambda_abs": 0.0}, {"beta": 1.0}, {"warmup_steps": -1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaptiveGradientClipper(make().items(), **bad)
