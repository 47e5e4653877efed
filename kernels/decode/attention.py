"""Attention of one query a sequence over cached keys and values, split over the keys where sequences are few."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that keep an H100's 132 multiprocessors busy, two each.
ENOUGH_PROGRAMS = 264
MOST_SPLITS = 32


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, part_o, part_m, part_l, slots_ptr, lengths_ptr, scale, stride_slot, stride_head,
    HQ: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots_ptr + row)
    length = tl.load(lengths_ptr + slot) + 1
    span = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
    start = split * span
    end = tl.minimum(length, start + span)
    g, d, n = tl.arange(0, GP), tl.arange(0, BD), tl.arange(0, BN)
    q_at = q_ptr + (row * HQ + head * GROUP + g[:, None]) * D + d[None]
    q = tl.load(q_at, mask=(g[:, None] < GROUP) & (d[None] < D), other=0.0)
    base = slot * stride_slot + head * stride_head
    top = tl.full([GP], float("-inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BD], tl.float32)
    for first in range(start, end, BN):
        ok = first + n < end
        at = base + (first + n[:, None]) * D + d[None]
        inside = ok[:, None] & (d[None] < D)
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
        logits = tl.where(ok[None], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(logits - higher[:, None])
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PREC)
        total = total * shrink + tl.sum(p, 1)
        top = higher
    real = g < GROUP
    if SPLITS == 1:
        out_at = out_ptr + (row * HQ + head * GROUP + g[:, None]) * D + d[None]
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real[:, None] & (d[None] < D))
    else:
        part = (row * HQ + head * GROUP + g) * SPLITS + split
        tl.store(part_m + part, top, mask=real)
        tl.store(part_l + part, total, mask=real)
        tl.store(part_o + part[:, None] * D + d[None], acc, mask=real[:, None] & (d[None] < D))


@triton.jit
def _combine(part_o, part_m, part_l, out_ptr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BD)
    top = tl.load(part_m + row * SPLITS + s)
    # A split beyond the sequence's end has seen nothing: -inf, hence weight 0.
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(part_l + row * SPLITS + s), 0)
    o = tl.load(part_o + (row * SPLITS + s[:, None]) * D + d[None], mask=d[None] < D, other=0.0)
    out = tl.sum(weight[:, None] * o, 0) / total
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v over each sequence's cached tokens, the newest (position lengths[slot]) included.

    Args:
        q: [R, Hq, D] contiguous.
        k, v: [slots, Hkv, L, D] contiguous.
        slots: [R] int64; lengths: [slots] int64, tokens before the newest. Read on the device.
        scale: of the logits.

    Returns:
        [R, Hq, D] in q's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads or k.shape != v.shape or k.shape[3] != dim:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit")
    group = heads // kv_heads
    splits = 1
    while rows * kv_heads * splits < ENOUGH_PROGRAMS and splits < MOST_SPLITS:
        splits *= 2
    out = torch.empty_like(q)
    parts = rows * heads * splits if splits > 1 else 1
    part_o = q.new_empty(parts * dim, dtype=torch.float32)
    part_m, part_l = (q.new_empty(parts, dtype=torch.float32) for _ in range(2))
    padded = triton.next_power_of_2(dim)
    _attend[(rows, kv_heads, splits)](
        q, k, v, out, part_o, part_m, part_l, slots, lengths, scale / math.log(2), k.stride(0), k.stride(1),
        HQ=heads, GROUP=group, GP=max(16, triton.next_power_of_2(group)), D=dim, BD=max(16, padded),
        BN=64 if padded <= 64 else 32, SPLITS=splits, PREC="ieee", num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * heads,)](part_o, part_m, part_l, out, D=dim, BD=max(16, padded), SPLITS=splits, num_warps=2)
    return out
