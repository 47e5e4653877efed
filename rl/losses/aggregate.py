"""From one value a token to the scalar that is minimised."""

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence", "constant"]


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    aggregation: Aggregation,
    *,
    max_length: int | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """Mean over tokens (DAPO, arXiv 2503.14476), mean over sequences of their token means (GRPO, arXiv 2402.03300), or
    sum over sequences x max_length (Dr.GRPO, arXiv 2503.20783).

    Args:
        per_token: [B, T] float; mask: [B, T] bool or 0/1.
        aggregation: `token`, `sequence` or `constant`.
        max_length: tokens a sequence, for `constant`.
        normalizer: the denominator, when this call sees one microbatch of a larger batch: all its tokens (`token`) or
            sequences (`sequence`, `constant`). None: those of this call.

    Returns:
        Scalar.

    Raises:
        ValueError: `constant` without max_length.
    """
    inside = mask.bool()
    values = torch.where(inside, per_token, torch.zeros_like(per_token))
    sequences = float(max(per_token.shape[0], 1))
    if aggregation == "token":
        return values.sum() / (normalizer or inside.sum().clamp(min=1))
    if aggregation == "sequence":
        return (values.sum(1) / inside.sum(1).clamp(min=1)).sum() / (normalizer or sequences)
    if max_length is None:
        raise ValueError("aggregation 'constant' needs max_length (tokens a sequence)")
    return values.sum() / ((normalizer or sequences) * max_length)
