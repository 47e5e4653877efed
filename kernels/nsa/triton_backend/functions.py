"""The public functions on Triton kernels, with autograd. Callers in plumbline.kernels.nsa check the arguments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plumbline.kernels.nsa.config import NSAConfig, PhiParams, key_position
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend import mix
from plumbline.kernels.nsa.triton_backend.common import LN2, LOG2E, pad_dim, rows_contiguous
from plumbline.kernels.nsa.triton_backend.compress import Phi
from plumbline.kernels.nsa.triton_backend.forward import Compressed, selected_forward
from plumbline.kernels.nsa.triton_backend.launch import (
    Branch,
    Range,
    Selection,
    backward,
    dense_forward,
)
from plumbline.kernels.nsa.triton_backend.scores import select_blocks

# Widest head whose compressed branch is worked out in float32.
NARROW = 32


def _branch(do: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_lse: Tensor | None = None) -> Branch:
    """What backward reads when no gate scales the branch."""
    dot = (do.float() * out.float()).sum(-1)
    if d_lse is not None:
        dot = dot - d_lse
    return Branch(k, v, lse.masked_fill(lse == -torch.inf, torch.inf), dot, d_lse=d_lse)


class DenseAttention(torch.autograd.Function):
    """(out, lse in natural log) over a Range of keys."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Range, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = map(rows_contiguous, (q, k, v))
        out, lse = dense_forward(q, k, v, layout, reach, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = layout, reach, scale
        return out, lse * LN2

    @staticmethod
    def backward(ctx, do: Tensor, d_lse: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        layout, reach, scale = ctx.rest
        do = do.contiguous()
        # d lse / d logit is p, in the same place as -dot.
        dense = (_branch(do, out, k, v, lse, d_lse), reach)
        name = "cmp" if reach.kind == 0 else "win"
        dq, grads = backward(q, do, layout, scale, *((dense, None, None) if name == "cmp" else (None, None, dense)))
        dk, dv = grads[name]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


class SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, layout: Layout, selection: Selection, scale: float) -> Tensor:
        q, k, v = map(rows_contiguous, (q, k, v))
        listed = selection.listed(layout, pair_bytes(q, k, v))
        out, lse, _ = selected_forward(q, k, v, layout, selection, scale, listed, None)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = layout, selection, scale, listed
        return out

    @staticmethod
    def backward(ctx, do: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        layout, selection, scale, listed = ctx.rest
        do = do.contiguous()
        dq, grads = backward(q, do, layout, scale, None, (_branch(do, out, k, v, lse), selection), None, listed)
        dk, dv = grads["slc"]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


class FusedAttention(torch.autograd.Function):
    """Everything: compression, the three branches, their gated sum. Also returns the blocks used.

    Compression is part of it so that the compressed keys' and values' gradients reach phi in float32.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k_raw: Tensor, v_raw: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
        gates: Tensor, k_weight: Tensor, k_position: Tensor, v_weight: Tensor, v_position: Tensor,
        layout: Layout, config: NSAConfig, scale: float, block_indices: Tensor | None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        q, k_raw, v_raw, k_slc, v_slc, k_win, v_win = map(
            rows_contiguous, (q, k_raw, v_raw, k_slc, v_slc, k_win, v_win)
        )
        gates = gates.contiguous()
        phi = Phi(layout, config.block, config.stride, config.phi)
        # Fine enough for the compressed branch.
        fine = compressed_type(q)
        q_cmp = q.to(fine)
        # What all blocks have in common is left out before they are rounded: no softmax sees it in the keys, and the
        # output gets it back when the branches are mixed.
        position = key_position(k_position, config)
        k_base = None if position is None else phi.base(k_raw, k_weight, position)
        base = phi.base(v_raw, v_weight, v_position)
        k_cmp = phi.forward(k_raw, k_weight, position, k_base, fine)
        v_cmp = phi.forward(v_raw, v_weight, v_position, base, fine)
        o_cmp = lse_cmp = None
        if k_cmp.shape[0] > 0:
            o_cmp, lse_cmp = dense_forward(
                q_cmp, k_cmp, v_cmp, layout, Range.compressed(config.block, config.stride), scale
            )
        if block_indices is not None:
            indices, selection = block_indices, Selection(block_indices.contiguous(), config.select_block, None)
        else:
            lse = lse_cmp if lse_cmp is not None else q.new_zeros(q.shape[:2], dtype=torch.float32)
            everything = layout.longest <= config.count * config.select_block
            indices = (
                first_blocks(layout, k_slc.shape[1], config)
                if everything
                else select_blocks(q_cmp, k_cmp, lse, layout, config, scale)
            )
            selection = Selection(None if everything else indices, config.select_block, None if everything else config)
        listed = selection.listed(layout, pair_bytes(q, k_slc, v_slc))
        o_win, lse_win = dense_forward(q, k_win, v_win, layout, Range.window(config.window), scale)
        cmp = None if o_cmp is None or lse_cmp is None else Compressed(o_cmp, lse_cmp, base)
        o_slc, lse_slc, out = selected_forward(q, k_slc, v_slc, layout, selection, scale, listed, (gates, cmp, o_win))
        ctx.save_for_backward(
            q, k_raw, v_raw, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, k_weight, k_position, v_weight,
            v_position, base, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, selection.indices,
        )  # fmt: skip
        ctx.rest = phi, config, scale, replace(selection, indices=None), listed
        ctx.mark_non_differentiable(indices)
        return out, indices

    @staticmethod
    def backward(ctx, do: Tensor, _: Tensor):
        (
            q, k_raw, v_raw, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, k_weight, k_position, v_weight,
            v_position, base, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, indices,
        ) = ctx.saved_tensors  # fmt: skip
        phi, config, scale, selection, listed = ctx.rest
        do = do.contiguous()
        rows = q.shape[0] * q.shape[1]
        # Rows of 16 numbers each: kernels are compiled for addresses that are multiples of 16 bytes and for others.
        shifts, dots = torch.empty(2, 3, -(-rows // 16) * 16, dtype=torch.float32, device=q.device)
        shift, dot = (x[:, :rows].view(3, *q.shape[:2]) for x in (shifts, dots))
        d_gates = torch.empty_like(gates)
        has_cmp = o_cmp is not None
        dim = o_win.shape[2]
        mix.gate_gradients[(-(-rows // 16),)](
            do, o_cmp if has_cmp else o_win, base, o_slc, o_win, lse_cmp if has_cmp else lse_win, lse_slc, lse_win,
            gates, d_gates, shift, dot,
            rows, shifts.stride(0), q.shape[1], GROUP=q.shape[1] // k_win.shape[1], HAS_CMP=has_cmp, DV=dim,
            BV=pad_dim(dim), ROWS=16, num_warps=4,
        )  # fmt: skip
        cmp = None
        if has_cmp:
            cmp = Branch(k_cmp, v_cmp, shift[0], dot[0], gates[..., 0]), Range.compressed(config.block, config.stride)
        # Apart from the other branches where its type is another.
        apart = cmp is not None and k_cmp.dtype != q.dtype
        dq, grads = backward(
            q, do, phi.layout, scale,
            None if apart else cmp,
            (Branch(k_slc, v_slc, shift[1], dot[1]), replace(selection, indices=indices)),
            (Branch(k_win, v_win, shift[2], dot[2]), Range.window(config.window)),
            listed, k_cmp.dtype,
        )  # fmt: skip
        if apart:
            dq_cmp, grads_cmp = backward(q.to(k_cmp.dtype), do.to(k_cmp.dtype), phi.layout, scale, cmp, None, None)
            dq, grads = dq + dq_cmp, grads | grads_cmp
        dq = dq.to(q.dtype)
        flat = [g.to(q.dtype) for name in ("slc", "win") for g in grads[name]]
        if not has_cmp:
            return dq, None, None, *flat, d_gates, *[None] * 8
        dk, dk_weight, dk_position = phi.backward(k_raw, k_weight, key_position(k_position, config), grads["cmp"][0])
        dv, dv_weight, dv_position = phi.backward(v_raw, v_weight, v_position, grads["cmp"][1])
        if dk_position is None:
            dk_position = torch.zeros_like(k_position)
        return dq, dk, dv, *flat, d_gates, dk_weight, dk_position, dv_weight, dv_position, *[None] * 4


def compressed_type(q: Tensor) -> torch.dtype:
    """Of the compressed branch's keys, values and products.

    float32 for narrow heads, where it costs next to nothing: phi's gradients have few numbers there (a mean's weight
    has l a head), each a sum that may come out small by chance, so that in bfloat16 one seed in twenty would be off by
    more than a relative 5e-3.
    """
    return torch.float32 if q.shape[2] <= NARROW else q.dtype


def pair_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Bytes of a pair's part: the group's rows of output, or of query gradient."""
    return q.shape[1] // k.shape[1] * max(k.shape[2], v.shape[2]) * q.element_size()


def first_blocks(layout: Layout, kv_heads: int, config: NSAConfig) -> Tensor:
    """[T, Hkv, count] int32 where every candidate is chosen: 0 .. own block, then -1."""
    t = torch.arange(layout.tokens, device=layout.device) - torch.repeat_interleave(
        layout.cu_seqlens[:-1].long(), layout.lengths, output_size=layout.tokens
    )
    j = torch.arange(config.count, device=layout.device)
    indices = torch.where(j <= (t // config.select_block)[:, None], j, -1).int()
    return indices[:, None].expand(-1, kv_heads, -1).contiguous()


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: Layout, block: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    return DenseAttention.apply(q, k_cmp, v_cmp, layout, Range.compressed(block, stride), scale)


def window_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int, scale: float) -> Tensor:
    return DenseAttention.apply(q, k, v, layout, Range.window(window), scale)[0]


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Layout, select_block: int, scale: float
) -> Tensor:
    return SelectedAttention.apply(q, k, v, layout, Selection(indices.contiguous(), select_block, None), scale)


@torch.no_grad()
def choose_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, layout: Layout, config: NSAConfig, scale: float) -> Tensor:
    """lse in natural log."""
    return select_blocks(rows_contiguous(q), rows_contiguous(k_cmp), (lse * LOG2E).contiguous(), layout, config, scale)


def native_sparse_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    params: PhiParams,
    config: NSAConfig,
    layout: Layout,
    scale: float,
    block_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, Dv], blocks used [T, Hkv, count])."""
    return FusedAttention.apply(q, *kv_cmp, *kv_slc, *kv_win, gates, *params, layout, config, scale, block_indices)
