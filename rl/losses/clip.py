"""PPO's clipped surrogate (arXiv 1707.06347, eq. 7), with DAPO's separate bounds (arXiv 2503.14476, eq. 8)."""

import torch
from torch import Tensor


def clip_surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): no gradient once the ratio has left the range on the gaining side.

    Args:
        ratio: [B, T] with gradient; advantages: [B, 1] or [B, T].
        low, high: DAPO's clip-higher has high > low (0.28 and 0.2).

    Returns:
        [B, T] loss of each token.
    """
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
