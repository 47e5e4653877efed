"""The pointwise parts of a decoder layer for a handful of rows, each in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(x_ptr, delta_ptr, w_ptr, y_ptr, eps, H, HAS: tl.constexpr, BH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BH)
    ok = c < H
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * H + c, mask=ok, other=0.0)
    if HAS:
        x = (x.to(tl.float32) + tl.load(delta_ptr + row * H + c, mask=ok, other=0.0).to(tl.float32)).to(kind)
        tl.store(x_ptr + row * H + c, x, mask=ok)
    x = x.to(tl.float32)
    y = (x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)).to(kind)
    y = y.to(tl.float32) * tl.load(w_ptr + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * H + c, y.to(kind), mask=ok)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place (if given), then RMSNorm(x) * weight in float32, rounded as models/attention.RMSNorm does.

    Args:
        x, delta: [R, H] contiguous; weight: [H].

    Returns:
        [R, H] in x's dtype.
    """
    y = torch.empty_like(x)
    rows, width = x.shape
    _add_rms_norm[(rows,)](
        x, x if delta is None else delta, weight, y, eps, width,
        HAS=delta is not None, BH=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def _silu_mul(x_ptr, y_ptr, W, BW: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BW + tl.arange(0, BW)
    ok = c < W
    gate = tl.load(x_ptr + row * 2 * W + c, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * W + W + c, mask=ok, other=0.0).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    act = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(y_ptr + row * W + c, (act * up).to(kind), mask=ok)


def silu_mul(x: Tensor) -> Tensor:
    """[R, 2 W], gate and up side by side -> silu(gate) * up [R, W]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](x, y, width, BW=block, num_warps=4)
    return y


@triton.jit
def _turn(low, high, n_ptr, cos_ptr, sin_ptr, eps, c, ok, kind: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """The halves of a head, normed (NORM) and rotated, in `kind`."""
    half: tl.constexpr = D // 2
    first, second = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first = (first * inverse).to(kind).to(tl.float32) * tl.load(n_ptr + c, mask=ok, other=0.0).to(tl.float32)
        second = (second * inverse).to(kind).to(tl.float32)
        second = second * tl.load(n_ptr + half + c, mask=ok, other=0.0).to(tl.float32)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    cos = tl.load(cos_ptr + c, mask=ok, other=0.0)
    sin = tl.load(sin_ptr + c, mask=ok, other=0.0)
    return (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)


@triton.jit
def _rotate_and_append(
    x_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, slots_ptr, lengths_ptr, qn_ptr, kn_ptr, eps, stride_slot, stride_head,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = D // 2
    c = tl.arange(0, BH)
    ok = c < half
    at = x_ptr + (row * (HQ + 2 * HKV) + head) * D + c
    low = tl.load(at, mask=ok, other=0.0)
    high = tl.load(at + half, mask=ok, other=0.0)
    slot = tl.load(slots_ptr + row)
    position = tl.load(lengths_ptr + slot)
    kind = q_ptr.dtype.element_ty
    if head < HQ + HKV:
        n_ptr = qn_ptr if head < HQ else kn_ptr
        low, high = _turn(low, high, n_ptr, cos_ptr + row * D, sin_ptr + row * D, eps, c, ok, kind, D, NORM)
    if head < HQ:
        to = q_ptr + (row * HQ + head) * D + c
    elif head < HQ + HKV:
        to = k_ptr + slot * stride_slot + (head - HQ) * stride_head + position * D + c
    else:
        to = v_ptr + slot * stride_slot + (head - HQ - HKV) * stride_head + position * D + c
    tl.store(to, low, mask=ok)
    tl.store(to + half, high, mask=ok)


def rotate_and_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    lengths: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """RoPE on queries and keys (after their RMSNorm, where a model has one); keys and values go into the cache.

    Args:
        qkv: [R, (Hq + 2 Hkv) D], the projections side by side.
        cos, sin: [R, D] float32.
        k, v: [slots, Hkv, L, D], written at position lengths[slot]; must be of qkv's dtype.
        slots: [R] int64; lengths: [slots] int64.
        heads: Hq.
        norms: (query weight [D], key weight [D], eps).

    Returns:
        q [R, Hq, D].
    """
    rows, kv_heads, dim = qkv.shape[0], k.shape[1], k.shape[3]
    q = qkv.new_empty(rows, heads, dim)
    query_norm, key_norm, eps = norms or (qkv, qkv, 0.0)
    _rotate_and_append[(rows, heads + 2 * kv_heads)](
        qkv, cos, sin, q, k, v, slots, lengths, query_norm, key_norm, eps, k.stride(0), k.stride(1),
        HQ=heads, HKV=kv_heads, D=dim, BH=triton.next_power_of_2(dim // 2), NORM=norms is not None, num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _rotate_and_gate(
    x_ptr, cos_ptr, sin_ptr, turned_ptr, gates_ptr, qn_ptr, kn_ptr, eps, width, gates_at,
    HQ: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Programs (row, 0 .. HEADS - 1): a head that is rotated, the first HQ of them queries; (row, HEADS): the gates."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kind = turned_ptr.dtype.element_ty
    if head < HEADS:
        half: tl.constexpr = D // 2
        c = tl.arange(0, BH)
        ok = c < half
        at = x_ptr + row * width + head * D + c
        low = tl.load(at, mask=ok, other=0.0)
        high = tl.load(at + half, mask=ok, other=0.0)
        n_ptr = qn_ptr if head < HQ else kn_ptr
        low, high = _turn(low, high, n_ptr, cos_ptr + row * D, sin_ptr + row * D, eps, c, ok, kind, D, NORM)
        to = turned_ptr + (row * HEADS + head) * D + c
        tl.store(to, low, mask=ok)
        tl.store(to + half, high, mask=ok)
    else:
        g = tl.arange(0, BG)
        logits = tl.load(x_ptr + row * width + gates_at + g, mask=g < 3 * HQ, other=0.0).to(tl.float32)
        tl.store(gates_ptr + row * 3 * HQ + g, (1.0 / (1.0 + tl.exp(-logits))).to(kind), mask=g < 3 * HQ)


def rotate_and_gate(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """What Native Sparse Attention reads of a token: RoPE on queries and the keys of its three branches (after their
    RMSNorm, where a model has one), and the sigmoid of the gates.

    Args:
        projected: [R, W] contiguous, side by side: Hq queries, 3 Hkv keys and 3 Hkv values of D each (cmp, slc, win),
            3 Hq gate logits; what follows is padding.
        cos, sin: [R, D] float32.
        heads, kv_heads: Hq, Hkv.
        norms: (query weight [D], key weight [D], eps).

    Returns:
        q [R, Hq, D], (k, v) [R, Hkv, D] of each branch and gates [R, Hq, 3], in projected's dtype. The values are views
        of `projected`; queries and keys are views of one tensor; only the gates are contiguous.

    Raises:
        ValueError: W is too small.
    """
    (rows, width), dim = projected.shape, cos.shape[-1]
    turned_heads, gates_at = heads + 3 * kv_heads, (heads + 6 * kv_heads) * dim
    if width < gates_at + 3 * heads:
        raise ValueError(f"projected has {width} columns, fewer than the {gates_at + 3 * heads} of its parts")
    turned = projected.new_empty(rows, turned_heads, dim)
    gates = projected.new_empty(rows, heads, 3)
    query_norm, key_norm, eps = norms or (projected, projected, 0.0)
    _rotate_and_gate[(rows, turned_heads + 1)](
        projected, cos, sin, turned, gates, query_norm, key_norm, eps, width, gates_at,
        HQ=heads, HEADS=turned_heads, D=dim, BH=triton.next_power_of_2(dim // 2),
        BG=triton.next_power_of_2(3 * heads), NORM=norms is not None, num_warps=1,
    )  # fmt: skip
    values = projected[:, turned_heads * dim : gates_at].unflatten(1, (-1, dim))
    pairs = list(zip(turned[:, heads:].split(kv_heads, 1), values.split(kv_heads, 1), strict=True))
    return turned[:, :heads], pairs, gates
