"""Log-probabilities of chosen tokens without ever holding a full [tokens, vocab] matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 2048,
) -> tuple[Tensor, Tensor]:
    """log softmax(lm_head(hidden) / temperature)[target], and the entropy, in chunks recomputed in the backward pass.

    Args:
        hidden: [N, D], the final hidden state that predicts each target.
        targets: [N] int64.
        lm_head: maps [n, D] to [n, vocab] logits.
        temperature: the sampling temperature.
        chunk_tokens: logits of so many tokens exist at once (float32, forward and backward).

    Returns:
        (logprobs [N] float32 with gradient, entropy [N] float32 without), in nats.
    """
    if hidden.shape[0] == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty

    def chunk(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = lm_head(h).float() / temperature
        log_normaliser = torch.logsumexp(logits, -1)
        chosen = logits.gather(-1, t[:, None]).squeeze(-1) - log_normaliser
        with torch.no_grad():
            probabilities = (logits - log_normaliser[:, None]).exp()
            entropy = log_normaliser - (probabilities * logits).sum(-1)
        return chosen, entropy

    parts = []
    for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled() and hidden.shape[0] > chunk_tokens:
            parts.append(checkpoint(chunk, h, t, use_reentrant=False))
        else:
            parts.append(chunk(h, t))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).detach()
