"""ZClip: gradient clipping by the z-score of the global norm (arXiv 2504.02507). A baseline for AdaGC."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from plumbline.rl.adagc import whole_norm


class ZScoreClipper:
    """Clips all gradients together once their global norm is `threshold` standard deviations over its running mean.

    With z = (||g|| - mu) / sigma above the threshold, the norm is brought to mu + threshold^2 / z sigma (the paper's
    reciprocal rule: the further out, the harder). mu and sigma^2 are exponential moving averages of the norms as they
    stand after clipping; the first `warmup_steps` norms initialise them, under a plain clip to max_norm.

    Args:
        parameters: whose `.grad` is clipped.
        max_norm: norm of the warm-up's clip.
        threshold: z above which it acts (the paper: 2.5).
        alpha: decay of the averages (the paper: 0.97).
        warmup_steps: the paper: 25.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        max_norm: float = 1.0,
        threshold: float = 2.5,
        alpha: float = 0.97,
        warmup_steps: int = 25,
    ) -> None:
        if max_norm <= 0 or threshold <= 0 or not 0 <= alpha < 1 or warmup_steps < 2:
            raise ValueError(
                f"max_norm ({max_norm}) and threshold ({threshold}) must be positive, alpha ({alpha}) in [0, 1), "
                f"warmup_steps ({warmup_steps}) at least 2"
            )
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.max_norm, self.threshold, self.alpha, self.warmup_steps = max_norm, threshold, alpha, warmup_steps
        self.early: list[float] = []
        self.mean = self.variance = math.nan

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale `.grad` in place; returns the global norm before. A non-finite norm changes nothing."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        total = torch.stack([whole_norm(grad) for grad in grads]).norm()
        norm = total.item()
        if not math.isfinite(norm):
            return total
        if len(self.early) < self.warmup_steps:
            after = min(norm, self.max_norm)
            self.early.append(after)
            if len(self.early) == self.warmup_steps:
                self.mean = sum(self.early) / len(self.early)
                self.variance = sum((x - self.mean) ** 2 for x in self.early) / len(self.early)
        else:
            deviation = math.sqrt(self.variance)
            z = (norm - self.mean) / max(deviation, 1e-12)
            after = self.mean + self.threshold**2 / z * deviation if z > self.threshold else norm
            self.mean = self.alpha * self.mean + (1 - self.alpha) * after
            self.variance = self.alpha * self.variance + (1 - self.alpha) * (after - self.mean) ** 2
        if after < norm:
            for grad in grads:
                grad.mul_(after / norm)
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"early": list(self.early), "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.early = list(state["early"])
        self.mean, self.variance = state["mean"], state["variance"]
