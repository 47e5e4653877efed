"""Slot caches of a policy: one store a layer, one length a slot."""

from __future__ import annotations

import torch
from torch import Tensor

from plumbline.kernels.nsa import DecodePlan, NSACache
from plumbline.models.config import PolicyConfig


class FullCache:
    """Keys and values of one full-attention layer: k, v [slots, Hkv, max_length, D]."""

    def __init__(
        self, slots: int, max_length: int, heads: int, dim: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.k = torch.zeros(slots, heads, max_length, dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]


class StepPlan:
    """Index tensors of one decode step under full attention, shared by all layers."""

    def __init__(self, slots: Tensor, lengths: Tensor, max_length: int) -> None:
        self.slots, self.position = slots, lengths
        self.longest = int(lengths.max()) + 1
        if self.longest > max_length:
            raise ValueError(f"a sequence of {self.longest} tokens does not fit a cache of {max_length}")
        self.mask = (torch.arange(self.longest, device=slots.device) <= lengths[:, None])[:, None, None]


class PolicyCache:
    """All layers' caches.

    Args:
        config: the policy's.
        slots: sequences.
        max_length: tokens a slot can hold.

    Attributes:
        lengths: [slots] int64, tokens in each slot.
        layers: FullCache or NSACache of each layer.
    """

    def __init__(
        self, config: PolicyConfig, slots: int, max_length: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if slots < 1 or max_length < 1:
            raise ValueError(f"slots ({slots}) and max_length ({max_length}) must be at least 1")
        self.config, self.max_length = config, max_length
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        heads, dim = config.num_key_value_heads, config.head_dim
        self.layers: list[FullCache | NSACache] = [
            NSACache(slots, max_length, heads, dim, dim, config.nsa_config, dtype=dtype, device=device)
            if config.attention == "nsa"
            else FullCache(slots, max_length, heads, dim, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        ]

    def plan(self, slots: Tensor) -> DecodePlan | StepPlan:
        """What the next decode step of these slots needs to know."""
        lengths = self.lengths[slots]
        if self.config.attention == "nsa":
            return DecodePlan(slots, lengths, self.config.nsa_config, self.max_length)
        return StepPlan(slots, lengths, self.max_length)

    def fixed_plan(self, slots: Tensor) -> DecodePlan:
        """The same for sparse attention, made for the longest sequence that fits: nothing is read back from the device,
        and no shape depends on a length. No sequence may be full already."""
        return DecodePlan(slots, self.lengths[slots], self.config.nsa_config, self.max_length, longest=self.max_length)

    def reset(self, slots: Tensor) -> None:
        """Empty these slots."""
        self.lengths[slots] = 0

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Slot sources[i] -> slot targets[i]; both [n] int64."""
        used = int(self.lengths[sources].max()) if sources.numel() else 0
        for layer in self.layers:
            for tensor in layer.tensors():
                # Of a ring shorter than `used`, all of it.
                tensor[targets, :, :used] = tensor[sources, :, :used]
        self.lengths[targets] = self.lengths[sources]
