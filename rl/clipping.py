"""The gradient clipping that a config names."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plumbline.rl.adagc import AdaptiveGradientClipper
from plumbline.rl.distributed import whole
from plumbline.rl.sections import ClippingSection
from plumbline.rl.zclip import ZScoreClipper


class Clipper(Protocol):
    """Called between backward and the optimizer's step."""

    def clip(self) -> Tensor:
        """Scale gradients in place; returns their global norm before (not finite: nothing was changed)."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GlobalClipper:
    """Brings the global norm down to `max_norm`; infinite leaves the gradients alone."""

    def __init__(self, model: nn.Module, max_norm: float) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.max_norm = max_norm

    def clip(self) -> Tensor:
        # A DTensor's norm is a partial sum on each rank until it is made whole.
        total = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if math.isfinite(self.max_norm) and bool(torch.isfinite(total)):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, total)
        return total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"global clipping has no state, the checkpoint's has {sorted(state)}")


def make_clipper(settings: ClippingSection, model: nn.Module) -> Clipper:
    """settings.method over the trainable parameters of `model`."""
    if settings.method == "adagc":
        return AdaptiveGradientClipper(
            model.named_parameters(), settings.max_norm, settings.relative, settings.beta, settings.warmup_steps
        )
    if settings.method == "zclip":
        return ZScoreClipper(
            model.parameters(), settings.max_norm, settings.threshold, settings.alpha, settings.warmup_steps
        )
    return GlobalClipper(model, settings.max_norm if settings.method == "global" else math.inf)
