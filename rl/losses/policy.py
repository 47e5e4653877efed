"""The clipped policy-gradient loss of PPO (arXiv 1707.06347) and its descendants GRPO, Dr.GRPO, DAPO and GSPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """What distinguishes the family's members.

    Attributes:
        ratio: `token` (PPO, GRPO) or `sequence` (GSPO, arXiv 2507.18071: the geometric mean over a sequence's tokens).
        aggregation: `token` divides the sum over tokens by their number (DAPO, arXiv 2503.14476); `sequence` takes the
            mean of each sequence's mean (GRPO); `constant` divides by sequences x max_length (Dr.GRPO).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        max_length: tokens a sequence, for `constant`.
        normalizer: the denominator, when this call sees one microbatch of a larger batch: all tokens (`token`), all
            sequences (`sequence`, `constant`). None: those of this call.
    """

    ratio: Literal["token", "sequence"] = "token"
    aggregation: Literal["token", "sequence", "constant"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    max_length: int | None = None
    normalizer: float | None = None


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), aggregated; rho = exp(logprob - old logprob).

    Args:
        logprobs: [B, T] float, with gradient, log-probability of each completion token under the current policy.
        old_logprobs: [B, T] float, under the policy that sampled it.
        advantages: [B] or [B, T] float.
        mask: [B, T] bool or 0/1, True on completion tokens.
        config: see LossConfig; None is its defaults.

    Returns:
        (loss scalar, stats). Stats are detached scalars over masked tokens: `ratio_mean`, `ratio_max`,
        `clip_fraction_low`, `clip_fraction_high` (tokens whose gradient the clip removed), `approx_kl` (mean of
        rho - 1 - log rho).

    Raises:
        ValueError: shapes do not fit, or `constant` without max_length.
    """
    config = config or LossConfig()
    if logprobs.ndim != 2 or logprobs.shape != old_logprobs.shape or logprobs.shape != mask.shape:
        raise ValueError(
            "logprobs, old_logprobs and mask must share one shape [B, T], got "
            f"{list(logprobs.shape)}, {list(old_logprobs.shape)}, {list(mask.shape)}"
        )
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    if advantages.shape[0] != logprobs.shape[0] or advantages.shape[1] not in (1, logprobs.shape[1]):
        raise ValueError(
            f"advantages must be [B] or [B, T] for B, T = {list(logprobs.shape)}, got {list(advantages.shape)}"
        )
    inside = mask.to(logprobs.dtype)
    # Padding may hold anything, -inf included; zero it before any arithmetic can make a NaN of it.
    difference = torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs))
    token_ratio = difference.exp()
    if config.ratio == "sequence":
        lengths = inside.sum(1, keepdim=True).clamp(min=1)
        ratio = (difference.sum(1, keepdim=True) / lengths).exp().expand_as(difference)
    else:
        ratio = token_ratio
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    loss = aggregate(per_token, mask, config)

    with torch.no_grad():
        count = inside.sum().clamp(min=1)
        low = (ratio < 1 - config.clip_low) & (advantages < 0)
        high = (ratio > 1 + config.clip_high) & (advantages > 0)
        stats = {
            "ratio_mean": (ratio * inside).sum() / count,
            "ratio_max": (ratio * inside).max() if ratio.numel() else ratio.new_zeros(()),
            "clip_fraction_low": (low * inside).sum() / count,
            "clip_fraction_high": (high * inside).sum() / count,
            "approx_kl": ((token_ratio - 1 - difference) * inside).sum() / count,
        }
    return loss, stats


def aggregate(per_token: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """[B, T] per-token values -> the scalar that config.aggregation asks for."""
    inside = mask.to(per_token.dtype)
    values = torch.where(mask.bool(), per_token, torch.zeros_like(per_token))
    sequences = float(per_token.shape[0])
    if config.aggregation == "token":
        return values.sum() / (config.normalizer or inside.sum().clamp(min=1))
    if config.aggregation == "sequence":
        means = values.sum(1) / inside.sum(1).clamp(min=1)
        return means.sum() / (config.normalizer or max(sequences, 1.0))
    if config.max_length is None:
        raise ValueError("aggregation 'constant' needs max_length (tokens a sequence)")
    return values.sum() / ((config.normalizer or max(sequences, 1.0)) * config.max_length)
