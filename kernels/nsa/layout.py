"""From packed sequences to a padded batch and back, with what depends only on lengths worked out once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

V = TypeVar("V")

# Masks of all query-key pairs are kept for sequences up to this length and made per chunk of queries beyond it.
KEEP_MASK_TOKENS = 4096


class _Pad(torch.autograd.Function):
    """[T, ...] -> [B, L, ...]. The gradient of padding is dropped: it repeats rows that nothing may see there."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return x[gather]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        return grad.flatten(0, 1)[scatter], None, None


class _Unpad(torch.autograd.Function):
    """[B L, ...] -> [T, ...]."""

    @staticmethod
    def forward(ctx, x: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.rows = x.shape[0]
        return x[scatter]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (scatter,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, scatter, grad), None


class Layout:
    """Padding plan of packed sequences: computed once for a batch, used by every branch and layer.

    Sequences of one length are a padded batch already; padding is then a view and costs nothing.

    Args:
        cu_seqlens: [B+1] int32.

    Attributes:
        starts: B ints, first packed row of each sequence.
        sizes: B ints, tokens of each sequence.
        lengths: [B] int64, the same on the device.
        longest: L.
        tokens: T.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        ends = cu_seqlens.tolist()
        self.cu_seqlens = cu_seqlens
        self.device = cu_seqlens.device
        self.starts: list[int] = ends[:-1]
        self.sizes: list[int] = [b - a for a, b in pairwise(ends)]
        if ends[0] != 0 or min(self.sizes, default=0) < 0:
            raise ValueError("cu_seqlens must start at 0 and not decrease")
        self.lengths = cu_seqlens[1:].long() - cu_seqlens[:-1].long()
        self.longest = max(self.sizes, default=0)
        self.tokens = ends[-1]
        self.uniform = self.tokens == self.longest * len(self.sizes)
        self._memo: dict[tuple[object, ...], object] = {}

    def memo(self, key: tuple[object, ...], make: Callable[[], V]) -> V:
        """The value under key, made on first use: tables that depend on lengths and sizes alone."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]  # type: ignore[return-value]

    @cached_property
    def valid(self) -> Tensor:
        """[B, L] bool, False on padding."""
        return torch.arange(self.longest, device=self.device)[None] < self.lengths[:, None]

    @cached_property
    def _gather(self) -> Tensor:
        """[B, L] packed row of each padded position; padding repeats other rows."""
        rows = self.cu_seqlens[:-1, None].long() + torch.arange(self.longest, device=self.device)
        return rows.clamp(max=max(self.tokens - 1, 0))

    @cached_property
    def _scatter(self) -> Tensor:
        return self.valid.flatten().nonzero().squeeze(1)

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, L, D]; rows beyond a sequence's end repeat others and must be masked (no gradient)."""
        if self.uniform:
            return x.unflatten(0, (len(self.sizes), self.longest)).transpose(1, 2)
        return _Pad.apply(x, self._gather, self._scatter).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, L, D] -> [T, H, D]."""
        packed = x.transpose(1, 2).flatten(0, 1)
        return packed if self.uniform else _Unpad.apply(packed, self._scatter)

    def causal(self, first: int, last: int, window: int | None = None) -> Tensor:
        """[last - first, L] bool: key s visible to query t in [first, last), within the window if one is given."""

        def make(start: int, stop: int) -> Tensor:
            distance = torch.arange(start, stop, device=self.device)[:, None] - torch.arange(
                self.longest, device=self.device
            )
            return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

        if self.longest > KEEP_MASK_TOKENS:
            return make(first, last)
        return self.memo(("causal", window), lambda: make(0, self.longest))[first:last]

    def visible_blocks(self, first: int, last: int, blocks: int, block: int, stride: int) -> Tensor:
        """[last - first, blocks] bool: compression block i complete at query t.

        Needs no lengths: t < length holds for real queries.
        """

        def make(start: int, stop: int) -> Tensor:
            ends = torch.arange(blocks, device=self.device) * stride + block - 1
            return ends[None] <= torch.arange(start, stop, device=self.device)[:, None]

        if self.longest > KEEP_MASK_TOKENS:
            return make(first, last)
        return self.memo(("blocks", blocks, block, stride), lambda: make(0, self.longest))[first:last]
