"""The fused log-probabilities against PyTorch, in Triton's interpreter."""

import pytest
import torch

from plumbline.kernels.logprobs import logits_gradient_, logprob_stats


@pytest.mark.parametrize("vocab", [17, 5000])
@pytest.mark.parametrize("bonus", [False, True])
def test_triton_logprobs_entropy_and_gradient(vocab, bonus):
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab) * 4
    logits[2] *= 250  # probabilities that underflow
    logits[3, ::2] = -float("inf")
    targets = torch.randint(0, vocab // 2, (6,)) * 2 + 1
    exact = logits.double().requires_grad_()
    log_p = torch.log_softmax(exact / 0.8, -1)
    want = log_p.gather(1, targets[:, None])[:, 0]
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    got, got_entropy, normalisers = logprob_stats(logits, targets, 0.8)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    grad, entropy_grad = torch.randn(6), torch.randn(6)
    finite = torch.isfinite(logits)
    total = (want * grad.double()).sum()
    # The entropy's own gradient, written out: autograd gives NaN where a probability is 0.
    expected = torch.autograd.grad(total, exact)[0]
    if bonus:
        slope = -p * (torch.where(finite, log_p, 0.0) + entropy[:, None]) / 0.8
        expected = expected + entropy_grad.double()[:, None] * slope
    result = logits_gradient_(
        logits.clone(), targets, normalisers, got_entropy, grad, entropy_grad if bonus else None, 0.8
    )
    torch.testing.assert_close(result.double(), expected.detach(), rtol=1e-4, atol=1e-5)
