"""Losses against loops written from their formulas, in float64."""

import math

import pytest
import torch

from plumbline.rl.logprobs import token_logprobs
from plumbline.rl.losses import LossConfig, kl_penalty, policy_loss, rollout_correction, value_loss

LENGTHS = [5, 2, 7]


def batch():
    torch.manual_seed(1)
    shape = (3, 7)
    logprobs = -torch.rand(shape, dtype=torch.float64) * 2
    old = logprobs + torch.randn(shape, dtype=torch.float64) * 0.4
    advantages = torch.tensor([1.3, -0.7, 0.4], dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
    old[~mask] = float("nan")  # padding must never matter
    return logprobs.requires_grad_(), old, advantages, mask


def by_hand(logprobs, old, advantages, config):
    sequences = []
    for b, length in enumerate(LENGTHS):
        differences = [logprobs[b, t] - old[b, t] for t in range(length)]
        mean = sum(differences) / length
        terms = []
        for difference in differences:
            ratio = (mean if config.ratio == "sequence" else difference).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            terms.append(-torch.minimum(ratio * advantages[b], clipped * advantages[b]))
        sequences.append(terms)
    if config.aggregation == "token":
        return sum(sum(terms) for terms in sequences) / sum(LENGTHS)
    if config.aggregation == "sequence":
        return sum(sum(terms) / len(terms) for terms in sequences) / 3
    return sum(sum(terms) for terms in sequences) / (3 * config.max_length)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_policy_loss_and_gradient(ratio, aggregation):
    logprobs, old, advantages, mask = batch()
    config = LossConfig(ratio=ratio, aggregation=aggregation, clip_low=0.2, clip_high=0.28, max_length=9)
    loss, stats = policy_loss(logprobs, old, advantages, mask, config)
    expected = by_hand(logprobs, old, advantages, config)
    torch.testing.assert_close(loss, expected)
    got, want = torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(expected, logprobs)[0]
    torch.testing.assert_close(got, want)
    assert all(math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_microbatches_add_up_to_the_whole(aggregation):
    logprobs, old, advantages, mask = batch()
    whole, _ = policy_loss(logprobs, old, advantages, mask, LossConfig(aggregation=aggregation, max_length=9))
    normalizer = float(sum(LENGTHS)) if aggregation == "token" else 3.0
    config = LossConfig(aggregation=aggregation, max_length=9, normalizer=normalizer)
    parts = [
        policy_loss(logprobs[i : i + 1], old[i : i + 1], advantages[i : i + 1], mask[i : i + 1], config)[0]
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_clip_fractions_count_tokens_that_lost_their_gradient():
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = torch.tensor([[0.5, -0.5, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    loss, stats = policy_loss(logprobs, old, torch.tensor([1.0], dtype=torch.float64), mask)
    assert stats["clip_fraction_high"] == pytest.approx(1 / 3)
    assert stats["clip_fraction_low"] == 0
    gradient = torch.autograd.grad(loss, logprobs)[0][0]
    assert gradient[0] == 0
    assert gradient[1] != 0
    assert gradient[3] == 0


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cispo_keeps_a_gradient_beyond_the_clip(ratio):
    logprobs, old, advantages, mask = batch()
    config = LossConfig(surrogate="cispo", ratio=ratio, clip_low=1.0, clip_high=0.1)
    loss, _ = policy_loss(logprobs, old, advantages, mask, config)
    got = torch.autograd.grad(loss, logprobs)[0]
    for b, length in enumerate(LENGTHS):
        differences = [(logprobs[b, t] - old[b, t]).item() for t in range(length)]
        for t in range(length):
            difference = sum(differences) / length if ratio == "sequence" else differences[t]
            weight = min(math.exp(difference), 1.1)
            assert got[b, t].item() == pytest.approx(-weight * advantages[b].item() / sum(LENGTHS))
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("method", ["truncate", "mask"])
def test_rollout_correction(method, level):
    _, old, _, mask = batch()
    rollout = torch.where(mask, old + torch.randn(old.shape, dtype=torch.float64) * 0.5, float("inf"))
    weights = rollout_correction(old, rollout, mask, method, level, 0.8, 1.25)
    for b, length in enumerate(LENGTHS):
        differences = [float(old[b, t] - rollout[b, t]) for t in range(length)]
        for t in range(length):
            weight = math.exp(sum(differences) if level == "sequence" else differences[t])
            expected = min(weight, 1.25) if method == "truncate" else weight * (0.8 <= weight <= 1.25)
            assert weights[b, t].item() == pytest.approx(expected)


def test_weights_multiply_each_token():
    logprobs, old, advantages, mask = batch()
    weights = torch.rand(logprobs.shape, dtype=torch.float64)
    weighted, _ = policy_loss(logprobs, old, advantages, mask, weights=weights)
    plain, _ = policy_loss(logprobs, old, advantages, mask)
    got, bare = torch.autograd.grad(weighted, logprobs)[0], torch.autograd.grad(plain, logprobs)[0]
    torch.testing.assert_close(got[mask], (bare * weights)[mask])


def test_entropy_has_a_gradient_when_asked():
    torch.manual_seed(2)
    hidden, head = torch.randn(7, 8, requires_grad=True), torch.nn.Linear(8, 13, bias=False)
    targets = torch.randint(0, 13, (7,))
    full = torch.log_softmax(head(hidden), -1)
    want = torch.autograd.grad(-(full.exp() * full).sum(), hidden)[0]
    for chunk in (3, 100):
        _, entropy = token_logprobs(hidden, targets, head, chunk_tokens=chunk, entropy_gradient=True)
        torch.testing.assert_close(torch.autograd.grad(entropy.sum(), hidden)[0], want)
        _, entropy = token_logprobs(hidden, targets, head, chunk_tokens=chunk)
        assert not entropy.requires_grad


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="without a bias"):
        token_logprobs(torch.randn(2, 8), torch.tensor([0, 1]), torch.nn.Linear(8, 13))


def test_bad_shapes_are_refused():
    logprobs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(logprobs, old[:, :3], advantages, mask)
    with pytest.raises(ValueError, match="advantages must be"):
        policy_loss(logprobs, old, advantages[:2], mask)
    with pytest.raises(ValueError, match="max_length"):
        policy_loss(logprobs, old, advantages, mask, LossConfig(aggregation="constant"))


def test_kl_estimators():
    p, q = torch.tensor([-0.3, -2.0], dtype=torch.float64), torch.tensor([-1.1, -0.4], dtype=torch.float64)
    d = p - q
    torch.testing.assert_close(kl_penalty(p, q, "k1"), d)
    torch.testing.assert_close(kl_penalty(p, q, "k2"), d * d / 2)
    torch.testing.assert_close(kl_penalty(p, q, "k3"), torch.exp(-d) - 1 + d)
    with pytest.raises(ValueError, match="unknown KL estimator"):
        kl_penalty(p, q, "k4")


def test_value_loss_takes_the_worse_of_clipped_and_unclipped():
    values = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    old, returns = torch.tensor([[0.0, 1.9]], dtype=torch.float64), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected = 0.5 * (max(0.0, (0.2 - 1) ** 2) + 1.0) / 2
    assert value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(expected)
    assert value_loss(values, old, returns, mask, None).item() == pytest.approx(0.25)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_logprobs_equal_the_full_matrix(chunk):
    torch.manual_seed(2)
    hidden = torch.randn(7, 8, requires_grad=True)
    head = torch.nn.Linear(8, 13, bias=False)
    targets = torch.randint(0, 13, (7,))
    logprobs, entropy = token_logprobs(hidden, targets, head, temperature=0.7, chunk_tokens=chunk)
    full = torch.log_softmax(head(hidden) / 0.7, -1)
    torch.testing.assert_close(logprobs, full.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1))
    got = torch.autograd.grad(logprobs.sum(), [hidden, head.weight], retain_graph=True)
    want = torch.autograd.grad(full.gather(1, targets[:, None]).sum(), [hidden, head.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
