"""The policy-gradient loss: a ratio, a surrogate and an aggregation. PPO, GRPO, Dr.GRPO, DAPO, GSPO and CISPO are settings of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plumbline.rl.losses.aggregate import Aggregation, aggregate
from plumbline.rl.losses.cispo import cispo_surrogate
from plumbline.rl.losses.clip import clip_surrogate
from plumbline.rl.losses.ratio import importance_ratio


@dataclass(frozen=True)
class LossConfig:
    """What distinguishes the family's members.

    Attributes:
        surrogate: `clip` (losses/clip.py) or `cispo` (losses/cispo.py).
        ratio: `token`, or `sequence` for GSPO (losses/ratio.py).
        aggregation, max_length, normalizer: see losses/aggregate.py.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    """

    surrogate: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    max_length: int | None = None
    normalizer: float | None = None

    def aggregate(self, per_token: Tensor, mask: Tensor) -> Tensor:
        return aggregate(per_token, mask, self.aggregation, max_length=self.max_length, normalizer=self.normalizer)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: LossConfig | None = None,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate of each token, weighted and aggregated; rho = exp(logprob - old logprob).

    Args:
        logprobs: [B, T] float, with gradient, log-probability of each completion token under the current policy.
        old_logprobs: [B, T] float, under the policy that the ratio is taken to.
        advantages: [B] or [B, T] float.
        mask: [B, T] bool or 0/1, True on completion tokens.
        config: see LossConfig; None is its defaults.
        weights: [B, T] float from losses/correction.py; None is 1 everywhere.

    Returns:
        (loss scalar, stats). Stats are detached scalars over masked tokens: `ratio_mean`, `ratio_max`,
        `clip_fraction_low`, `clip_fraction_high` (tokens whose gradient the clip removed or, for cispo, held back) and
        `approx_kl` (mean of rho - 1 - log rho).

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
    inside = mask.bool()
    # Padding may hold anything, -inf included; zero it before any arithmetic can make a NaN of it.
    zero = torch.zeros_like(logprobs)
    logprobs = torch.where(inside, logprobs, zero)
    difference = torch.where(inside, logprobs - old_logprobs, zero)
    ratio = importance_ratio(difference, mask, config.ratio)
    if config.surrogate == "cispo":
        per_token = cispo_surrogate(ratio, logprobs, advantages, config.clip_low, config.clip_high)
    else:
        per_token = clip_surrogate(ratio, advantages, config.clip_low, config.clip_high)
    if weights is not None:
        per_token = per_token * weights
    loss = config.aggregate(per_token, mask)

    with torch.no_grad():
        count = inside.sum().clamp(min=1)
        low = (ratio < 1 - config.clip_low) & (advantages < 0) & inside
        high = (ratio > 1 + config.clip_high) & (advantages > 0) & inside
        stats = {
            "ratio_mean": (ratio * inside).sum() / count,
            "ratio_max": (ratio * inside).max() if ratio.numel() else ratio.new_zeros(()),
            "clip_fraction_low": low.sum() / count,
            "clip_fraction_high": high.sum() / count,
            "approx_kl": ((difference.exp() - 1 - difference) * inside).sum() / count,
        }
    return loss, stats
