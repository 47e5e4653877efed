"""Compression of packed keys and values: the blocks' windows gathered once, the map as one matrix product a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbline.kernels.nsa.config import PhiKind
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend.tables import block_sizes


def _tables(layout: Layout, block: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cu_blocks [B+1] int32; [N, l] packed token of each place in a window; [r, T] place in the flattened windows
    [N l] where a token stands for the k-th time, N l where it does not). Gradients then are gathers: no atomics."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        sizes = torch.tensor(block_sizes(layout, block, stride))
        cu_blocks = F.pad(sizes.cumsum(0), (1, 0))
        total = int(cu_blocks[-1])
        lengths, starts = torch.tensor(layout.sizes), torch.tensor(layout.starts)
        number = torch.arange(total) - torch.repeat_interleave(cu_blocks[:-1], sizes)
        tokens = (torch.repeat_interleave(starts, sizes) + number * stride)[:, None] + torch.arange(block)
        position = torch.arange(layout.tokens) - torch.repeat_interleave(starts, lengths)
        first = torch.repeat_interleave(cu_blocks[:-1], lengths)
        count = torch.repeat_interleave(sizes, lengths)
        places = []
        for k in range(block // stride):
            i = position // stride - k
            place = (first + i) * block + position % stride + k * stride
            places.append(torch.where((i >= 0) & (i < count), place, total * block))
        return cu_blocks.int().to(layout.device), tokens.to(layout.device), torch.stack(places).to(layout.device)

    return layout.memo(("windows", block, stride), make)


class Windows(torch.autograd.Function):
    """x [T, H, D] -> [H, N, l, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.transpose(0, 1)[:, tokens]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        # One row more, of zeros, for tokens that stand in fewer windows than l / d.
        flat = F.pad(grad.flatten(1, 2), (0, 0, 0, 1))
        dx = flat[:, places[0]]
        for place in places[1:]:
            dx = dx + flat[:, place]
        return dx.transpose(0, 1), None, None


def compress(
    x: Tensor, weight: Tensor, position: Tensor | None, layout: Layout, block: int, stride: int, kind: PhiKind
) -> tuple[Tensor, Tensor]:
    """x [T, H, D] -> (blocks [N, H, D], cu_blocks [B+1] int32). weight, position: as in PhiParams; None: none."""
    cu_blocks, tokens, places = _tables(layout, block, stride)
    windows = Windows.apply(x, tokens, places)  # [H, N, l, D]
    weight = weight.to(x.dtype)
    # The position's part of the sum is the same for every block.
    if kind == "mean":
        hidden = torch.einsum("hnld,hl->hnd", windows, weight)
        if position is not None:
            hidden = hidden + torch.einsum("hld,hl->hd", position.to(x.dtype), weight)[:, None]
        return hidden.transpose(0, 1).contiguous(), cu_blocks
    matrix = weight[:, :block].flatten(1, 2)
    hidden = torch.bmm(windows.flatten(2), matrix)
    if position is not None:
        hidden = hidden + torch.bmm(position.to(x.dtype).flatten(1)[:, None], matrix)
    if kind == "mlp":
        hidden = torch.bmm(F.gelu(hidden), weight[:, block])
    return hidden.transpose(0, 1).contiguous(), cu_blocks
