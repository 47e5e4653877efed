"""Normalising token-level advantages over a batch, as PPO's published implementations do."""

import torch
from torch import Tensor


def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / (std + eps) over masked tokens, std with N - 1 degrees of freedom.

    Args:
        advantages: [B, T] float; mask: [B, T] bool or 0/1, with at least one token.

    Returns:
        [B, T], zero outside the mask.

    Raises:
        ValueError: shapes differ or the mask is empty.
    """
    if advantages.shape != mask.shape:
        raise ValueError(f"advantages {list(advantages.shape)} and mask {list(mask.shape)} differ in shape")
    inside = mask.bool()
    chosen = advantages[inside]
    if chosen.numel() == 0:
        raise ValueError("no token to whiten over")
    spread = chosen.std() if chosen.numel() > 1 else chosen.new_zeros(())
    return torch.where(inside, (advantages - chosen.mean()) / (spread + eps), torch.zeros_like(advantages))
