"""Log-probabilities of chosen tokens without ever holding a full [tokens, vocab] matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.kernels.nsa.backend import Backend, use_triton


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    lm_head: nn.Linear,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
    entropy_gradient: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature)[target], and the entropy, in chunks whose logits are made twice.

    Args:
        hidden: [N, D], the final hidden state that predicts each target.
        targets: [N] int64.
        lm_head: without a bias.
        temperature: the sampling temperature.
        chunk_tokens: logits of so many tokens exist at once, forward and backward; under autocast in its dtype.
        entropy_gradient: an entropy bonus is part of the loss.
        backend: `triton` passes over the logits once each way (kernels/logprobs.py); see kernels.nsa.

    Returns:
        (logprobs [N] float32 with gradient, entropy [N] float32, with one if entropy_gradient), in nats.

    Raises:
        ValueError: lm_head has a bias.
    """
    if lm_head.bias is not None:
        raise ValueError("token_logprobs needs an lm_head without a bias")
    if hidden.shape[0] == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, lm_head.weight, targets, temperature, chunk_tokens, entropy_gradient, use_triton(backend, hidden[:, :1])
    )
    return logprobs, entropy if entropy_gradient else entropy.detach()


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the hidden states and two numbers a token; backward makes each chunk's logits again and turns them into
    their own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        bonus: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        matrix = weight.to(hidden.dtype)
        parts = [
            _stats(F.linear(h, matrix), t, temperature, fused)
            for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropy, normalisers = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, targets, normalisers, entropy)
        ctx.settings = (temperature, chunk, bonus, fused)
        if not bonus:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalisers, entropy = ctx.saved_tensors
        temperature, chunk, bonus, fused = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        # Sums over many chunks: float32, or a bfloat16 sum would lose the small ones.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=wide) if need_weight else None
        matrix = weight.to(hidden.dtype)
        for first in range(0, hidden.shape[0], chunk):
            at = slice(first, first + chunk)
            logits = F.linear(hidden[at], matrix)
            slope = _gradient(
                logits,
                targets[at],
                normalisers[at],
                entropy[at],
                grad[at].contiguous(),
                entropy_grad[at].contiguous() if bonus and entropy_grad is not None else None,
                temperature,
                fused,
            )
            if hidden_grad is not None:
                hidden_grad[at] = slope @ matrix
            if weight_grad is not None:
                weight_grad += slope.T @ hidden[at]
        return (
            hidden_grad,
            weight_grad.to(weight.dtype) if weight_grad is not None else None,
            None,
            None,
            None,
            None,
            None,
        )


def _stats(logits: Tensor, targets: Tensor, temperature: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, entropy, log of the normaliser), each [n] float32 or wider."""
    if fused:
        from plumbline.kernels.logprobs import logprob_stats

        return logprob_stats(logits, targets, temperature)
    scaled = _scaled(logits, temperature)
    normalisers = torch.logsumexp(scaled, -1)
    chosen = scaled.gather(-1, targets[:, None]).squeeze(-1) - normalisers
    probabilities = (scaled - normalisers[:, None]).exp()
    return chosen, normalisers - (probabilities * scaled).sum(-1), normalisers


def _gradient(
    logits: Tensor,
    targets: Tensor,
    normalisers: Tensor,
    entropy: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    fused: bool,
) -> Tensor:
    """Gradient [n, V] with respect to the logits, in their dtype."""
    if fused:
        from plumbline.kernels.logprobs import logits_gradient_

        return logits_gradient_(logits, targets, normalisers, entropy, grad, entropy_grad, temperature)
    log_p = _scaled(logits, temperature) - normalisers[:, None]
    p = log_p.exp()
    slope = p * -grad[:, None]
    slope[torch.arange(len(targets), device=targets.device), targets] += grad
    if entropy_grad is not None:
        slope -= entropy_grad[:, None] * p * (log_p + entropy[:, None])
    return (slope / temperature).to(logits.dtype)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
