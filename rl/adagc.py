"""AdaGC: adaptive gradient clipping for each parameter tensor (arXiv 2502.11034)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AdaptiveGradientClipper:
    """Clips each tensor's gradient to a multiple of the running norm of its own past gradients.

    Warm-up (the first `warmup_steps` calls): all gradients are scaled by h = min(1, lambda_abs / ||g_all||), and each
    tensor's gamma is the smallest norm it has had after that scaling. Afterwards: h_i = min(1, lambda_rel gamma_i /
    ||g_i||), g_i <- h_i g_i, and then gamma_i <- beta gamma_i + (1 - beta) ||g_i|| with the clipped norm.

    A norm of exactly zero (a LoRA A at its first step, an idle expert) never enters gamma: it would freeze the tensor
    for ever. A tensor without a gamma is left unclipped on its first non-zero gradient, which sets it. Call `clip()`
    between backward and the optimizer's step. For sharded parameters (DTensor) the norm is the whole tensor's.

    Args:
        named_parameters: pairs (name, parameter); names key the saved state and must be unique.
        lambda_abs: norm of the global clip in warm-up.
        lambda_rel: factor over gamma afterwards (1.05; 1.04 in the paper's second version).
        beta: decay of gamma (0.98; 0.99 in the second version).
        warmup_steps: T_start.

    Raises:
        ValueError: a setting out of range, or two parameters of one name.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lambda_abs: float = 1.0,
        lambda_rel: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
    ) -> None:
        pairs = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self.parameters = dict(pairs)
        if len(self.parameters) != len(pairs):
            raise ValueError("named_parameters holds one name twice")
        if lambda_abs <= 0 or lambda_rel <= 0:
            raise ValueError(f"lambda_abs ({lambda_abs}) and lambda_rel ({lambda_rel}) must be positive")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {beta}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.lambda_abs = lambda_abs
        self.lambda_rel = lambda_rel
        self.beta = beta
        self.warmup_steps = warmup_steps
        self.step = 0
        self.gamma: dict[str, Tensor] = {}

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale `.grad` in place. Returns the global gradient norm before clipping (scalar, float32 or wider).

        A non-finite gradient changes nothing, neither gradients nor state: the returned norm is then not finite, and
        the caller decides whether to skip the step.
        """
        found = [(name, p.grad) for name, p in self.parameters.items() if p.grad is not None]
        if not found:
            return torch.zeros(())
        norms = [whole_norm(grad) for _, grad in found]
        total = torch.stack(norms).norm()
        if not torch.isfinite(total):
            return total
        warming = self.step < self.warmup_steps
        shared = torch.clamp(self.lambda_abs / total, max=1.0) if total > 0 else torch.ones_like(total)
        for (name, grad), norm in zip(found, norms, strict=True):
            if norm == 0:
                continue
            gamma = self.gamma.get(name)
            if warming:
                grad.mul_(shared.to(grad.dtype))
                clipped = norm * shared
                self.gamma[name] = clipped if gamma is None else torch.minimum(gamma, clipped)
            elif gamma is None:
                self.gamma[name] = norm.clone()
            else:
                scale = torch.clamp(self.lambda_rel * gamma / norm, max=1.0)
                grad.mul_(scale.to(grad.dtype))
                self.gamma[name] = self.beta * gamma + (1 - self.beta) * norm * scale
        self.step += 1
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "gamma": {name: value.clone() for name, value in self.gamma.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        unknown = sorted(set(state["gamma"]) - set(self.parameters))
        if unknown:
            raise ValueError(f"AdaGC state has norms of parameters this model lacks: {', '.join(unknown[:3])}")
        self.step = int(state["step"])
        self.gamma = {name: value.clone() for name, value in state["gamma"].items()}


def whole_norm(grad: Tensor) -> Tensor:
    """Norm of a gradient in float32 or wider; of the whole tensor where the gradient is a shard (DTensor)."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    # A DTensor's norm is still a partial sum on each rank until it is made whole.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
