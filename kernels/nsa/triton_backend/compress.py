"""Compression of packed keys and values as matrix products over chunks of `stride` tokens.

Block i is l / d consecutive chunks, so phi's first layer is a sum over r of chunk i + r times the r-th part of the
weight: each token is read once, and gradients are sums of gathers without atomics. What lies between the inputs and the
compressed blocks stays in float32 (float32 factors of products are split in two halves of the inputs' type): rounding
it would cost the gradients that pass through phi a relative 2e-3 at every place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbline.kernels.nsa.config import PhiKind
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend.tables import block_sizes


@dataclass(frozen=True)
class Chunks:
    """Where chunks and blocks lie.

    Attributes:
        cu_blocks: [B+1] int32.
        count: chunks of all sequences, those that fill up only.
        tokens: [count d] packed token of each chunk's tokens; None where they are the first count d.
        first: [N] first chunk of each block.
        blocks: [l/d, count] block that has chunk c as its r-th, N where there is none.
    """

    cu_blocks: Tensor
    count: int
    tokens: Tensor | None
    first: Tensor
    blocks: Tensor


def chunks_of(layout: Layout, block: int, stride: int) -> Chunks:
    def make() -> Chunks:
        sizes = torch.tensor(block_sizes(layout, block, stride))
        chunks = torch.tensor([n // stride for n in layout.sizes])
        starts, cu_blocks = torch.tensor(layout.starts), F.pad(sizes.cumsum(0), (1, 0))
        ends, total, count = chunks.cumsum(0), int(sizes.sum()), int(chunks.sum())
        within = torch.arange(count) - torch.repeat_interleave(ends - chunks, chunks)
        at = torch.repeat_interleave(starts, chunks) + within * stride
        tokens = (at[:, None] + torch.arange(stride)).flatten()
        plain = bool((tokens == torch.arange(count * stride)).all())
        number = torch.arange(total) - torch.repeat_interleave(cu_blocks[:-1], sizes)
        first = torch.repeat_interleave(ends - chunks, sizes) + number
        blocks = torch.full((block // stride, count), total)
        for r in range(block // stride):
            blocks[r, first + r] = torch.arange(total)
        device = layout.device
        return Chunks(
            cu_blocks.int().to(device), count, None if plain else tokens.to(device), first.to(device), blocks.to(device)
        )

    return layout.memo(("chunks", block, stride), make)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, batched, accumulated and returned in float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.device.type != "cuda":
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)


def halves(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of dtype whose sum is x, to twice the digits of dtype."""
    if x.dtype == dtype:
        return [x]
    high = x.to(dtype)
    return [high, (x - high.float()).to(dtype)]


@dataclass(frozen=True)
class Phi:
    """The compression map over a layout, forward and backward."""

    layout: Layout
    block: int
    stride: int
    kind: PhiKind

    @property
    def chunks(self) -> Chunks:
        return chunks_of(self.layout, self.block, self.stride)

    def _gather(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [H, chunks, d, D]."""
        chunks = self.chunks
        rows = x[: chunks.count * self.stride] if chunks.tokens is None else x[chunks.tokens]
        return rows.transpose(0, 1).reshape(x.shape[1], chunks.count, self.stride, x.shape[2])

    def _weights(self, weight: Tensor) -> list[Tensor]:
        """The parts of the weight that meet a block's chunks: [H, d D, D], or [H, d, 1] for a mean."""
        parts = weight[:, : self.block].split(self.stride, 1)
        return [part[..., None] if self.kind == "mean" else part.flatten(1, 2) for part in parts]

    def _constant(self, weight: Tensor, position: Tensor) -> Tensor:
        """[H, 1, D] float32: what the position adds to every block."""
        weight, position = weight[:, : self.block].float(), position.float()
        if self.kind == "mean":
            return torch.einsum("hld,hl->hd", position, weight)[:, None]
        return torch.bmm(position.flatten(1)[:, None], weight.flatten(1, 2))

    def _hidden(self, x: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
        """[H, N, D] float32: the first layer."""
        chunks, first = self._gather(x), self.chunks.first
        hidden = None
        for r, part in enumerate(self._weights(weight)):
            if self.kind == "mean":
                made = (chunks.float() * part[:, None].float()).sum(2)
            else:
                made = product(chunks.flatten(2), part)
            hidden = made[:, first + r] if hidden is None else hidden + made[:, first + r]
        assert hidden is not None
        return hidden if position is None else hidden + self._constant(weight, position)

    def base(self, x: Tensor, weight: Tensor, position: Tensor) -> Tensor:
        """[H, D] float32: the block of tokens that are zero, which all blocks have in common, for an x."""
        weight = weight.to(x.dtype)
        y = self._constant(weight, position)
        return (torch.bmm(F.gelu(y), weight[:, self.block].float()) if self.kind == "mlp" else y)[:, 0].contiguous()

    def forward(
        self, x: Tensor, weight: Tensor, position: Tensor | None, less: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """[T, H, D] -> [N, H, D]; weight and position as in PhiParams (None: none).

        less: [H, D] float32, taken off every block before it is rounded. dtype: of the blocks (None: x's).
        """
        weight = weight.to(x.dtype)
        y = self._hidden(x, weight, position)
        if self.kind == "mlp":
            y = sum(product(part, weight[:, self.block]) for part in halves(F.gelu(y), x.dtype))  # type: ignore[assignment]
        if less is not None:
            y = y - less[:, None]
        return y.transpose(0, 1).to(dtype or x.dtype).contiguous()

    def backward(
        self, x: Tensor, weight: Tensor, position: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of x, weight and position from grad [N, H, D] (float32, say)."""
        like, weight = weight, weight.to(x.dtype)
        g = grad.transpose(0, 1).float().contiguous()  # [H, N, D]
        d_last = None
        if self.kind == "mlp":
            g, d_last = self._last_layer(x, weight, position, g)
        chunks = self._gather(x)
        # One row more, of zeros, for chunks that are no block's r-th.
        padded, blocks = F.pad(g, (0, 0, 0, 1)), self.chunks.blocks
        parts = self._weights(weight)
        if self.kind == "mean":
            at = [padded[:, blocks[r], None] for r in range(len(parts))]  # [H, chunks, 1, D]
            d_weight = torch.cat([(chunks.float() * a).sum((1, 3)) for a in at], 1)
            rows = sum(a * part[:, None].float() for a, part in zip(at, parts, strict=True)).flatten(1, 2)  # type: ignore[union-attr]
        else:
            # Halves and parts lie side by side, so that one product adds them up before anything is rounded.
            side = halves(torch.cat([padded[:, blocks[r]] for r in range(len(parts))], 2), x.dtype)
            beside = torch.cat(side, 2)  # [H, chunks, halves parts D]
            made = product(chunks.flatten(2).transpose(1, 2), beside)
            made = made.unflatten(2, (len(side), len(parts), -1)).sum(2)  # [H, d D, parts, D]
            d_weight = made.transpose(1, 2).flatten(1, 2).unflatten(1, (self.block, -1))
            rows = torch.bmm(beside, torch.cat([part.transpose(1, 2) for part in parts] * len(side), 1))
            rows = rows.unflatten(2, (self.stride, -1)).flatten(1, 2)
        d_position = None
        if position is not None:
            total, first = g.sum(1), weight[:, : self.block].float()
            if self.kind == "mean":
                d_position = first[..., None] * total[:, None]
                d_weight = d_weight + (position.float() * total[:, None]).sum(-1)
            else:
                d_position = torch.einsum("hlio,ho->hli", first, total)
                d_weight = d_weight + position.float()[..., None] * total[:, None, None]
            d_position = d_position.to(position.dtype)
        if d_last is not None:
            d_weight = torch.cat([d_weight, d_last[:, None]], 1)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        tokens = self.chunks.tokens
        if tokens is None:
            dx[: rows.shape[1]] = rows.transpose(0, 1)
        else:
            dx[tokens] = rows.transpose(0, 1).to(x.dtype)
        return dx, d_weight.to(like.dtype), d_position

    def _last_layer(self, x: Tensor, weight: Tensor, position: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of the first layer, of the last layer's weight) from that of the result, [H, N, D]."""
        hidden = self._hidden(x, weight, position)
        inputs, grads = halves(F.gelu(hidden), x.dtype), halves(g, x.dtype)
        d_last = sum(product(a.transpose(1, 2), b) for a in inputs for b in grads)
        d_inputs = sum(product(b, weight[:, self.block].transpose(1, 2)) for b in grads)
        return torch.ops.aten.gelu_backward(d_inputs, hidden), d_last  # type: ignore[return-value]


class Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, position: Tensor, phi: Phi) -> Tensor:
        ctx.save_for_backward(x, weight, position)
        ctx.phi = phi
        return phi.forward(x, weight, position)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        return *ctx.phi.backward(*ctx.saved_tensors, grad), None


def compress(
    x: Tensor, weight: Tensor, position: Tensor, layout: Layout, block: int, stride: int, kind: PhiKind
) -> tuple[Tensor, Tensor]:
    """x [T, H, D] -> (blocks [N, H, D], cu_blocks [B+1] int32). weight, position: as in PhiParams."""
    phi = Phi(layout, block, stride, kind)
    return Compress.apply(x, weight, position, phi), phi.chunks.cu_blocks
