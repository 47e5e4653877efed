"""Correction for the rollout engine's log-probabilities not being the learner's (other kernels, precision, staleness)."""

from typing import Literal

import torch
from torch import Tensor


def rollout_correction(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    method: Literal["truncate", "mask"],
    level: Literal["token", "sequence"],
    low: float,
    high: float,
) -> Tensor:
    """w = pi_old / pi_rollout: min(w, high) (truncated importance sampling, F. Yao et al., "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training", 2025), or w where low <= w <= high and 0 elsewhere (masked, after
    IcePop: arXiv 2510.18855).

    Args:
        old_logprobs: [B, T] float, the learner's before its first optimizer step on the batch.
        rollout_logprobs: [B, T] float, the engine's when it drew the tokens.
        mask: [B, T] bool or 0/1, True on completion tokens.
        method: `truncate` or `mask`.
        level: w of a `token`, or of a whole `sequence` (the product over its tokens).
        low, high: bounds; `truncate` uses `high` alone.

    Returns:
        [B, T] weights without gradient (constant along a sequence for `sequence`); 1 outside the mask.
    """
    with torch.no_grad():
        difference = torch.where(mask.bool(), old_logprobs - rollout_logprobs, torch.zeros_like(old_logprobs))
        if level == "sequence":
            difference = difference.sum(1, keepdim=True).expand_as(difference)
        weights = difference.exp()
        if method == "truncate":
            return weights.clamp(max=high)
        return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))
