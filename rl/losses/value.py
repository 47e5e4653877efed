"""The critic's loss, clipped as in PPO's published code."""

import torch
from torch import Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    *,
    normalizer: float | None = None,
) -> Tensor:
    """0.5 mean over masked tokens of max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of the old value.

    Args:
        values: [B, T] float, with gradient.
        old_values: [B, T] float, at sampling time.
        returns: [B, T] float.
        mask: [B, T] bool or 0/1.
        clip: None turns clipping off.
        normalizer: tokens of the whole batch, when this call sees a part of it; None: those of this call.

    Returns:
        Scalar loss.

    Raises:
        ValueError: shapes differ.
    """
    if not values.shape == old_values.shape == returns.shape == mask.shape:
        raise ValueError("values, old_values, returns and mask must share one shape [B, T]")
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    inside = mask.bool()
    return 0.5 * torch.where(inside, error, torch.zeros_like(error)).sum() / (normalizer or inside.sum().clamp(min=1))
