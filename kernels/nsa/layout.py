"""From packed sequences to a padded batch and back, with what depends only on lengths worked out once."""

from __future__ import annotations

import torch
from torch import Tensor


class Layout:
    """Padding plan of packed sequences: computed once for a batch, used by every branch and layer.

    Sequences of one length are a padded batch already; padding is then a view and costs nothing.

    Args:
        cu_seqlens: [B+1] int32.

    Attributes:
        lengths: [B] int64.
        longest: L.
        tokens: T.
        valid: [B, L] bool, False on padding.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        ends = cu_seqlens.long()
        self.cu_seqlens = cu_seqlens
        self.device = cu_seqlens.device
        self.lengths = ends[1:] - ends[:-1]
        self.longest = int(self.lengths.max()) if self.lengths.numel() else 0
        self.tokens = int(ends[-1])
        self.uniform = self.tokens == self.longest * len(self.lengths)
        position = torch.arange(self.longest, device=self.device)
        self.valid = position[None] < self.lengths[:, None]
        if not self.uniform:
            # Packed row of each padded position (any row where there is none), and back.
            self._gather = (ends[:-1, None] + position[None]).clamp(max=max(self.tokens - 1, 0))
            self._scatter = self.valid.flatten().nonzero().squeeze(1)
        self._memo: dict[tuple[object, ...], Tensor] = {}

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, L, D]; rows beyond a sequence's end repeat others and must be masked."""
        padded = x.unflatten(0, (len(self.lengths), self.longest)) if self.uniform else x[self._gather]
        return padded.transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, L, D] -> [T, H, D]."""
        packed = x.transpose(1, 2).flatten(0, 1)
        return packed if self.uniform else packed[self._scatter]

    def causal(self, window: int | None = None) -> Tensor:
        """[L, L] bool: key s visible to query t, within the window if one is given."""
        key = ("causal", window)
        if key not in self._memo:
            t = torch.arange(self.longest, device=self.device)
            distance = t[:, None] - t[None]
            mask = distance >= 0
            self._memo[key] = mask if window is None else mask & (distance < window)
        return self._memo[key]

    def visible_blocks(self, blocks: int, block: int, stride: int) -> Tensor:
        """[L, blocks] bool: compression block i complete at query t. Needs no lengths: t < length holds for real queries."""
        key = ("blocks", blocks, block, stride)
        if key not in self._memo:
            t = torch.arange(self.longest, device=self.device)
            last = torch.arange(blocks, device=self.device) * stride + block - 1
            self._memo[key] = last[None] <= t[:, None]
        return self._memo[key]
