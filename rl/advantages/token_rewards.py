"""A sequence's reward and the KL penalty as rewards of its tokens (InstructGPT, arXiv 2203.02155, section 3.5)."""

import torch
from torch import Tensor


def token_rewards(rewards: Tensor, mask: Tensor, divergence: Tensor | None = None, coefficient: float = 0.0) -> Tensor:
    """-coefficient x divergence on every token; the sequence's reward on its last one.

    Args:
        rewards: [B] float.
        mask: [B, T] bool or 0/1, at least one token a sequence, tokens first and padding last.
        divergence: [B, T] float, a KL estimate a token; None leaves the penalty out.
        coefficient: its weight.

    Returns:
        [B, T], zero outside the mask.
    """
    inside = mask.bool()
    result = rewards.new_zeros(mask.shape)
    if divergence is not None:
        result = torch.where(inside, -coefficient * divergence, result)
    last = inside.sum(1) - 1
    rows = torch.arange(len(rewards), device=rewards.device)
    result[rows, last] = result[rows, last] + rewards
    return result
