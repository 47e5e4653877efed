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
        self.needs_lengths = config.rope_parameters["rope_type"] == "dynamic"
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype, totals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin of each token.

        Args:
            positions: [T] int64.
            dtype: of the result.
            totals: [T] int64, tokens of the whole sequence that each token is in; what `dynamic` depends on beyond
                max_position_embeddings. None: all are within.

        Returns:
            cos, sin [T, 1, head_dim].
        """
        frequencies, factor = self._on(positions.device)
        if totals is not None and self.needs_lengths:
            frequencies = self._dynamic(totals)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, float]:
        if device not in self._frequencies:
            parameters = self.config.rope_parameters
            kind = parameters["rope_type"]
            if kind in ("default", "dynamic"):
                frequencies, factor = 1.0 / parameters["rope_theta"] ** self._exponents(), 1.0
            else:
                frequencies, factor = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
            self._frequencies[device] = (frequencies.float().to(device), factor)
        return self._frequencies[device]

    def _exponents(self) -> Tensor:
        dim = self.config.head_dim
        return torch.arange(0, dim, 2, dtype=torch.float32) / dim

    def _dynamic(self, totals: Tensor) -> Tensor:
        """NTK-aware scaling: [T] -> [T, head_dim / 2]; the base grows with the length beyond the trained one."""
        parameters, dim = self.config.rope_parameters, self.config.head_dim
        factor, trained = parameters["factor"], self.config.max_position_embeddings
        growth = factor * totals.clamp(min=trained).float() / trained - (factor - 1)
        base = parameters["rope_theta"] * growth ** (dim / (dim - 2))
        return 1.0 / base[:, None] ** self._exponents().to(totals.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [T, H, D] with cos, sin [T, 1, D]; keeps x's dtype (under autocast cos and sin are float32, x is not)."""
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin).to(x.dtype)
