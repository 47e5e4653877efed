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
        first, second = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            inverse = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
            n_ptr = qn_ptr if head < HQ else kn_ptr
            first = (first * inverse).to(kind).to(tl.float32) * tl.load(n_ptr + c, mask=ok, other=0.0).to(tl.float32)
            second = (second * inverse).to(kind).to(tl.float32)
            second = second * tl.load(n_ptr + half + c, mask=ok, other=0.0).to(tl.float32)
            first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        cos = tl.load(cos_ptr + row * D + c, mask=ok, other=0.0)
        sin = tl.load(sin_ptr + row * D + c, mask=ok, other=0.0)
        low, high = (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)
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
