"""Rotary position embedding with the scalings of transformers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from plumbline.models.config import PolicyConfig


class Rope:
    """cos and sin of positions.

    No module and no buffer: a cast of the model to bfloat16 would round the frequencies, and loading through the meta
    device would lose them. They are worked out in float32 on first use.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] int64 -> cos, sin [T, 1, head_dim] in dtype."""
        frequencies, factor = self._on(positions.device)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, float]:
        if device not in self._frequencies:
            parameters = self.config.rope_parameters
            kind = parameters["rope_type"]
            if kind == "default":
                dim = self.config.head_dim
                exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
                frequencies, factor = 1.0 / parameters["rope_theta"] ** exponents, 1.0
            else:
                frequencies, factor = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
            self._frequencies[device] = (frequencies.float().to(device), factor)
        return self._frequencies[device]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [T, H, D] with cos, sin [T, 1, D]; keeps x's dtype (under autocast cos and sin are float32, x is not)."""
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).to(x.dtype)
