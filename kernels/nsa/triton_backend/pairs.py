"""Selected attention turned round: for each selection block, the queries that chose it.

A (query, kv head, slot) that names a block is a pair. Sorting pairs by block (listing.py) gives every block a list of
queries, so that a tile of many queries times the group's heads meets one block of keys: no group is padded, and each
block is read once an item rather than once a query. What a pair contributes is written to its own place and summed in
slot order later, so nothing needs atomics and every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plumbline.kernels.nsa.triton_backend.common import load_rows, store_rows
from plumbline.kernels.nsa.triton_backend.parts import (
    add_dot_parts,
    add_parts,
    dot_parts,
    left,
    load_row_parts,
    scale_parts,
    store_row_parts,
    zero_parts,
)


@triton.jit(do_not_specialize=["chunk_first", "blocks"])
def forward_pairs(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, items_ptr, pairs_ptr, blocks_ptr, scale, chunk_first, blocks,
    q_t, q_h, k_t, k_h, v_t, v_h,
    KV_HEADS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out [chunk, Hkv, COUNT, GROUP, Dv] and lse (log 2): attention of each pair of an item to its block alone."""
    PAIRS: tl.constexpr = ROWS // GROUP
    item = items_ptr + tl.program_id(0) * 4
    block, first, last = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    if block < blocks * KV_HEADS:
        kv_head = block // blocks
        where = blocks_ptr + block % blocks * 3
        start, length, position = tl.load(where), tl.load(where + 1), tl.load(where + 2)
        c = tl.arange(0, KEYS)
        column = position + c
        key_ok = (c < S) & (column < length)
        at = (start + column).to(tl.int64)
        k = load_row_parts(k_ptr, at * k_t + kv_head * k_h, key_ok, DK, BK, BK2)
        v = load_rows(v_ptr, at * v_t + kv_head * v_h, key_ok, DV, BV)
        r = tl.arange(0, ROWS)
        g = r % GROUP
        for i in range(first, last, PAIRS):
            ok = (r // GROUP < PAIRS) & (i + r // GROUP < last)
            pair = tl.load(pairs_ptr + i + r // GROUP, mask=ok, other=0)
            row = (chunk_first + pair // (COUNT * KV_HEADS)).to(tl.int64)
            t = (row - start).to(tl.int32)
            q = load_row_parts(q_ptr, row * q_t + (kv_head * GROUP + g) * q_h, ok, DK, BK, BK2)
            s = dot_parts(q, k, PREC)
            s = tl.where(key_ok[None, :] & (column[None, :] <= t[:, None]), s, float("-inf"))
            m = tl.max(s, 1) * scale
            base = tl.where(m == float("-inf"), 0.0, m)
            p = tl.exp2(s * scale - base[:, None])
            denominator = tl.sum(p, 1)
            out = (
                tl.dot(p.to(v.dtype), v, input_precision=PREC) / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
            )
            to = pair.to(tl.int64) * GROUP + g
            store_rows(out_ptr, to * DV, ok, out, DV, BV)
            tl.store(lse_ptr + to, m + tl.log2(denominator), mask=ok)


@triton.jit(do_not_specialize=["chunk_first", "blocks"])
def backward_pairs(
    q_ptr, do_ptr, k_ptr, v_ptr, shift_ptr, dot_ptr, dq_ptr, dk_ptr, dv_ptr, extra_k_ptr, extra_v_ptr, items_ptr,
    pairs_ptr, blocks_ptr, natural_scale, scale, chunk_first, blocks, q_t, q_h, k_t, k_h, v_t, v_h,
    KV_HEADS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq [chunk, Hkv, COUNT, GROUP, Dk] of each pair (without the factor natural_scale).

    The first item of a block adds to dk, dv [T, Hkv, D] float32, which no other program touches; the others leave
    theirs in extra [items, S, D] for add_extra.
    """
    PAIRS: tl.constexpr = ROWS // GROUP
    item = items_ptr + tl.program_id(0) * 4
    block, first, last, place = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    if block < blocks * KV_HEADS:
        kv_head = block // blocks
        where = blocks_ptr + block % blocks * 3
        start, length, position = tl.load(where), tl.load(where + 1), tl.load(where + 2)
        c = tl.arange(0, KEYS)
        column = position + c
        key_ok = (c < S) & (column < length)
        at = (start + column).to(tl.int64)
        k = load_row_parts(k_ptr, at * k_t + kv_head * k_h, key_ok, DK, BK, BK2)
        v = load_rows(v_ptr, at * v_t + kv_head * v_h, key_ok, DV, BV)
        dk = zero_parts(KEYS, DK, BK, BK2)
        dv = tl.zeros([KEYS, BV], tl.float32)
        r = tl.arange(0, ROWS)
        g = r % GROUP
        for i in range(first, last, PAIRS):
            ok = (r // GROUP < PAIRS) & (i + r // GROUP < last)
            pair = tl.load(pairs_ptr + i + r // GROUP, mask=ok, other=0)
            row = (chunk_first + pair // (COUNT * KV_HEADS)).to(tl.int64)
            t = (row - start).to(tl.int32)
            head = kv_head * GROUP + g
            flat = row * (KV_HEADS * GROUP) + head
            q = load_row_parts(q_ptr, row * q_t + head * q_h, ok, DK, BK, BK2)
            do = load_rows(do_ptr, flat * DV, ok, DV, BV)
            shift = tl.load(shift_ptr + flat, mask=ok, other=float("inf"))
            dot = tl.load(dot_ptr + flat, mask=ok, other=0.0)
            s = dot_parts(q, k, PREC)
            p = tl.exp2(s * scale - shift[:, None])
            p = tl.where(key_ok[None, :] & (column[None, :] <= t[:, None]), p, 0.0)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
            dp = tl.dot(do, tl.trans(v), input_precision=PREC)
            ds = (p * (dp - dot[:, None])).to(q[0].dtype)
            dk = add_dot_parts(tl.trans(ds), q, dk, PREC)
            dq = tl.dot(ds, k[0], input_precision=PREC)
            dq_at = (pair.to(tl.int64) * GROUP + g) * DK
            if BK2 == 0:
                store_rows(dq_ptr, dq_at, ok, dq, DK, BK)
            else:
                # One part at a time: fewer registers, and less shared memory for the exchange before the store.
                store_rows(dq_ptr, dq_at, ok, dq, BK, BK)
                for done in tl.static_range(BK, DK, BK2):
                    dq = tl.dot(ds, k[1 + (done - BK) // BK2], input_precision=PREC)
                    store_rows(dq_ptr + done, dq_at, ok, dq, left(DK, done, BK2), BK2)
        dk = scale_parts(dk, natural_scale)
        if place < 0:
            to = at * KV_HEADS + kv_head
            dk = add_parts(load_row_parts(dk_ptr, to * DK, key_ok, DK, BK, BK2), dk)
            store_row_parts(dk_ptr, to * DK, key_ok, dk, DK, BK, BK2)
            store_rows(dv_ptr, to * DV, key_ok, load_rows(dv_ptr, to * DV, key_ok, DV, BV) + dv, DV, BV)
        else:
            to = place.to(tl.int64) * S + c
            store_row_parts(extra_k_ptr, to * DK, c < S, dk, DK, BK, BK2)
            store_rows(extra_v_ptr, to * DV, c < S, dv, DV, BV)


@triton.jit(do_not_specialize=["blocks"])
def add_extra(
    part_ptr, total_ptr, first_extra_ptr, blocks_ptr, blocks,
    KV_HEADS: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """total [T, Hkv, DIM] float32 += the extra items of each block, in order."""
    block = tl.program_id(0)
    first, last = tl.load(first_extra_ptr + block), tl.load(first_extra_ptr + block + 1)
    if last > first:
        where = blocks_ptr + block % blocks * 3
        start, length, position = tl.load(where), tl.load(where + 1), tl.load(where + 2)
        c = tl.arange(0, KEYS)
        ok = (c < S) & (position + c < length)
        to = ((start + position + c).to(tl.int64) * KV_HEADS + block // blocks) * DIM
        total = load_rows(total_ptr, to, ok, DIM, BD)
        for item in range(first, last):
            total += load_rows(part_ptr, (item * S + c).to(tl.int64) * DIM, ok, DIM, BD)
        store_rows(total_ptr, to, ok, total, DIM, BD)
