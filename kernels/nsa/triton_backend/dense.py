"""Attention over contiguous ranges of keys: compressed blocks, the sliding window, and the forced selection blocks.

One tile holds `rows` rows: consecutive queries, each with all heads of one group, so that a tile reads each key once
for the whole group and no group is padded. What a query at position t sees, by KIND:

    CMP      compressed blocks [0, complete(t)), complete(t) = (t - l) // d + 1
    WIN      tokens (t - w, t]
    FORCED   tokens of the first `initial` and the newest `local` selection blocks, up to t
    INITIAL  (keys' gradients only) the first `initial` selection blocks, up to t

Logits are kept in units of log 2. Queries, keys and their gradients are tuples of one or two tiles (parts.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from plumbline.kernels.nsa.triton_backend.common import load_rows, store_rows
from plumbline.kernels.nsa.triton_backend.parts import (
    add_dot_parts,
    add_parts,
    dot_parts,
    load_key_tile,
    load_keys,
    load_queries,
    load_query_tile,
    load_row_parts,
    scale_parts,
    store_row_parts,
    zero_parts,
)

CMP, WIN, FORCED, INITIAL = 0, 1, 2, 3


@triton.jit
def key_range(t, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """[low, high) of the contiguous keys that t sees. CMP: A = l, B = d; WIN: A = w; FORCED: A = l', B = local."""
    if KIND == 0:
        low = t * 0
        high = tl.where(t >= A - 1, (t - (A - 1)) // B + 1, 0)
    elif KIND == 1:
        low = tl.maximum(t - A + 1, 0)
        high = t + 1
    else:
        low = tl.maximum((t // A - (B - 1)) * A, 0)
        high = t + 1
    return low, high


@triton.jit
def query_range(first, last, length, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """[low, high) of the positions that see any of the keys [first, last), and from where on all of them see all."""
    if KIND == 0:
        low = first * B + A - 1
        full = (last - 1) * B + A - 1
        high = length
    elif KIND == 1:
        low = first
        full = length
        high = tl.minimum(length, last - 1 + A)
    elif KIND == 2:
        low = first
        full = length
        high = tl.minimum(length, ((last - 1) // A + B) * A)
    else:
        low = first
        full = last - 1
        high = length
    return low, high, full


@triton.jit
def attend(q, acc, m, denominator, k, v, scale, low, high, columns, MASKED: tl.constexpr, PREC: tl.constexpr):
    """One step of the running softmax over a tile of keys."""
    s = dot_parts(q, k, PREC)
    if MASKED:
        s = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * scale)
        base = tl.where(new == float("-inf"), 0.0, new)
    else:
        new = tl.maximum(m, tl.max(s, 1) * scale)
        base = new
    p = tl.exp2(s * scale - base[:, None])
    alpha = tl.exp2(m - base)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PREC)
    return acc, new, denominator * alpha + tl.sum(p, 1)


@triton.jit
def forward_section(
    q, acc, m, denominator, k_ptr, k2_ptr, v_ptr, t, first, last, key_start, keys, kv_head, scale, k_t, k_h, v_t, v_h,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr, KEYS: tl.constexpr,
    PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc, m, denominator) of a tile of queries over all keys that they see by KIND."""
    low, high = key_range(t, KIND, A, B)
    low_first, high_first = key_range(first, KIND, A, B)
    low_last, high_last = key_range(last, KIND, A, B)
    c = tl.arange(0, KEYS)
    if KIND == 2:
        edge = tl.minimum(tl.minimum(low, INIT), high)
        for j in range(0, tl.minimum(low_last, INIT), KEYS):
            k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
            v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
            acc, m, denominator = attend(q, acc, m, denominator, k, v, scale, low * 0, edge, j + c, True, PREC)
    # Keys that only some queries of the tile see lie at both ends; between them no mask is needed.
    head_end = low_first + tl.cdiv(tl.maximum(low_last - low_first, 0), KEYS) * KEYS
    body_end = head_end + tl.maximum(high_first - head_end, 0) // KEYS * KEYS
    if KIND != 0:
        for j in range(low_first, head_end, KEYS):
            k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
            v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
            acc, m, denominator = attend(q, acc, m, denominator, k, v, scale, low, high, j + c, True, PREC)
    for j in range(head_end, body_end, KEYS):
        k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, True, TMA, DK, BK, BK2)
        v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, True, TMA, DV, BV)
        acc, m, denominator = attend(q, acc, m, denominator, k, v, scale, low, high, j + c, False, PREC)
    for j in range(body_end, high_last, KEYS):
        k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
        v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
        acc, m, denominator = attend(q, acc, m, denominator, k, v, scale, low, high, j + c, True, PREC)
    return acc, m, denominator


@triton.jit
def forward(
    q_ptr, k_ptr, k2_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, heads,
    GROUP: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out [T, Hq, Dv] and lse [T, Hq] (log 2) of one tile; INIT: tokens of the initial blocks (FORCED)."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tiles_ptr + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    start, length, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if KIND == 0:
        key_start, keys = tl.load(tile + 4), tl.load(tile + 5)
    else:
        key_start, keys = start, length
    r = tl.arange(0, ROWS)
    t = first + r // GROUP
    ok = (r // GROUP < QUERIES) & (t < end)
    head = kv_head * GROUP + r % GROUP
    row = (start + t).to(tl.int64)
    q = load_row_parts(q_ptr, row * q_t + head * q_h, ok, DK, BK, BK2)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BV], tl.float32)
    acc, m, denominator = forward_section(
        q, acc, m, denominator, k_ptr, k2_ptr, v_ptr, t, first, end - 1, key_start, keys, kv_head, scale, k_t, k_h,
        v_t, v_h, KIND, A, B, INIT, DK, DV, BK, BK2, BV, KEYS, PREC, TMA,
    )  # fmt: skip
    acc = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    store_rows(out_ptr, (row * heads + head) * DV, ok, acc, DV, BV)
    tl.store(lse_ptr + row * heads + head, m + tl.log2(denominator), mask=ok)


@triton.jit
def queries_step(
    q, do, dq, total, k, v, scale, shift, dot, low, high, columns,
    MASKED: tl.constexpr, TOTAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the gradient of a tile of queries (without the factor `scale`).

    TOTAL: also adds the logits' gradients of a row to total [rows].
    """
    s = dot_parts(q, k, PREC)
    p = tl.exp2(s * scale - shift[:, None])
    if MASKED:
        p = tl.where((columns[None, :] >= low[:, None]) & (columns[None, :] < high[:, None]), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PREC)
    ds = p * (dp - dot[:, None])
    if TOTAL:
        total += tl.sum(ds, 1)
    return add_dot_parts(ds.to(k[0].dtype), k, dq, PREC), total


@triton.jit
def queries_section(
    q, do, dq, k_ptr, k2_ptr, v_ptr, shift_ptr, dot_ptr, flat, ok, t, first, last, key_start, keys, kv_head, scale,
    k_t, k_h, v_t, v_h,
    KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr, KEYS: tl.constexpr,
    PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries through all keys that they see by KIND, added to dq.

    CMP: also the sums [rows] of the logits' gradients (zeros otherwise).
    """
    TOTAL: tl.constexpr = KIND == 0
    total = tl.zeros([q[0].shape[0]], tl.float32)
    shift = tl.load(shift_ptr + flat, mask=ok, other=float("inf"))
    dot = tl.load(dot_ptr + flat, mask=ok, other=0.0)
    low, high = key_range(t, KIND, A, B)
    low_first, high_first = key_range(first, KIND, A, B)
    low_last, high_last = key_range(last, KIND, A, B)
    c = tl.arange(0, KEYS)
    if KIND == 2:
        edge = tl.minimum(tl.minimum(low, INIT), high)
        for j in range(0, tl.minimum(low_last, INIT), KEYS):
            k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
            v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
            dq, total = queries_step(q, do, dq, total, k, v, scale, shift, dot, low * 0, edge, j + c, True, TOTAL, PREC)
    head_end = low_first + tl.cdiv(tl.maximum(low_last - low_first, 0), KEYS) * KEYS
    body_end = head_end + tl.maximum(high_first - head_end, 0) // KEYS * KEYS
    if KIND != 0:
        for j in range(low_first, head_end, KEYS):
            k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
            v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
            dq, total = queries_step(q, do, dq, total, k, v, scale, shift, dot, low, high, j + c, True, TOTAL, PREC)
    for j in range(head_end, body_end, KEYS):
        k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, True, TMA, DK, BK, BK2)
        v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, True, TMA, DV, BV)
        dq, total = queries_step(q, do, dq, total, k, v, scale, shift, dot, low, high, j + c, False, TOTAL, PREC)
    for j in range(body_end, high_last, KEYS):
        k = load_keys(k_ptr, k2_ptr, j, c, keys, key_start, kv_head, k_t, k_h, False, TMA, DK, BK, BK2)
        v = load_key_tile(v_ptr, j, c, keys, key_start, kv_head, v_t, v_h, False, TMA, DV, BV)
        dq, total = queries_step(q, do, dq, total, k, v, scale, shift, dot, low, high, j + c, True, TOTAL, PREC)
    return dq, total


@triton.jit
def backward_queries(
    q_ptr, do_ptr, dq_ptr, tiles_ptr, natural_scale, scale, q_t, q_h, heads,
    kc_ptr, kc2_ptr, vc_ptr, shift_c, dot_c, kc_t, kc_h, vc_t, vc_h,
    ks_ptr, ks2_ptr, vs_ptr, shift_s, dot_s, ks_t, ks_h, vs_t, vs_h,
    kw_ptr, kw2_ptr, vw_ptr, shift_w, dot_w, kw_t, kw_h, vw_t, vw_h,
    pairs_ptr, indices_ptr, pairs_first, total_ptr,
    GROUP: tl.constexpr, HAS_CMP: tl.constexpr, SLC: tl.constexpr, HAS_WIN: tl.constexpr, COUNT: tl.constexpr,
    SKIP: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, LOCAL: tl.constexpr, INITIAL_BLOCKS: tl.constexpr,
    W: tl.constexpr, WHOLE: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries through every branch in one pass, and what the gradients of a query's logits over the
    compressed blocks add up to: total [T, Hq] float32.

    SLC: 0 none, 1 the forced blocks plus the pairs of backward_pairs, 2 pairs alone, 3 a window of WHOLE (all blocks).
    pairs [t - pairs_first, Hkv, COUNT, GROUP, Dk]; SKIP: forced blocks have no pair.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tiles_ptr + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    start, length, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    r = tl.arange(0, ROWS)
    t = first + r // GROUP
    ok = (r // GROUP < QUERIES) & (t < end)
    head = kv_head * GROUP + r % GROUP
    row = (start + t).to(tl.int64)
    flat = row * heads + head
    last = end - 1
    q = load_row_parts(q_ptr, row * q_t + head * q_h, ok, DK, BK, BK2)
    do = load_rows(do_ptr, flat * DV, ok, DV, BV)
    dq = zero_parts(ROWS, DK, BK, BK2)
    if HAS_CMP:
        key_start, keys = tl.load(tile + 4), tl.load(tile + 5)
        dq, total = queries_section(q, do, dq, kc_ptr, kc2_ptr, vc_ptr, shift_c, dot_c, flat, ok, t, first, last,
                                    key_start, keys, kv_head, scale, kc_t, kc_h, vc_t, vc_h, 0, L, D, 0,
                                    DK, DV, BK, BK2, BV, KEYS, PREC, TMA)  # fmt: skip
        tl.store(total_ptr + flat, total, mask=ok)
    if SLC == 1:
        dq, _ = queries_section(q, do, dq, ks_ptr, ks2_ptr, vs_ptr, shift_s, dot_s, flat, ok, t, first, last, start,
                                length, kv_head, scale,
                                ks_t, ks_h, vs_t, vs_h, 2, S, LOCAL, INITIAL_BLOCKS * S,
                                DK, DV, BK, BK2, BV, KEYS, PREC, TMA)  # fmt: skip
    if SLC == 3:
        dq, _ = queries_section(q, do, dq, ks_ptr, ks2_ptr, vs_ptr, shift_s, dot_s, flat, ok, t, first, last, start,
                                length, kv_head, scale, ks_t, ks_h, vs_t, vs_h, 1, WHOLE, 0, 0,
                                DK, DV, BK, BK2, BV, KEYS, PREC, TMA)  # fmt: skip
    if HAS_WIN:
        dq, _ = queries_section(q, do, dq, kw_ptr, kw2_ptr, vw_ptr, shift_w, dot_w, flat, ok, t, first, last, start,
                                length, kv_head, scale, kw_t, kw_h, vw_t, vw_h, 1, W, 0, 0,
                                DK, DV, BK, BK2, BV, KEYS, PREC, TMA)  # fmt: skip
    if (SLC == 1) or (SLC == 2):
        kv_heads = heads // GROUP
        list_at = (row * kv_heads + kv_head) * COUNT
        pair_at = ((row - pairs_first) * kv_heads + kv_head) * COUNT
        own = t // S
        # Summed apart: an accumulator of dots would have every part change its layout through shared memory.
        parts = zero_parts(ROWS, DK, BK, BK2)
        for slot in range(COUNT):
            j = tl.load(indices_ptr + list_at + slot, mask=ok, other=-1)
            use = ok & (j >= 0) & (j <= own)
            if SKIP:
                use = use & (j >= INITIAL_BLOCKS) & (j <= own - LOCAL)
            part = load_row_parts(pairs_ptr, ((pair_at + slot) * GROUP + r % GROUP) * DK, use, DK, BK, BK2)
            parts = add_parts(parts, part)
        dq = add_parts(dq, parts)
    store_row_parts(dq_ptr, flat * DK, ok, scale_parts(dq, natural_scale), DK, BK, BK2)


@triton.jit
def keys_step(k, v, dk, dv, q, do, scale, shift, dot, visible, MASKED: tl.constexpr, PREC: tl.constexpr):
    """Adds a tile of queries to the gradients of a tile of keys and values; everything transposed [keys, rows]."""
    s = dot_parts(k, q, PREC)
    p = tl.exp2(s * scale - shift[None, :])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PREC)
    dp = tl.dot(v, tl.trans(do), input_precision=PREC)
    ds = p * (dp - dot[None, :])
    dk = add_dot_parts(ds.to(q[0].dtype), q, dk, PREC)
    return dk, dv


@triton.jit
def flat_rows(t, row, heads, g, BK2: tl.constexpr):
    """Where head g of packed token t, in int64 row, lies in [T, Hq].

    Two tiles of keys leave few registers: in 32 bits (of arrays with 2^31 numbers, the queries would not fit a card).
    """
    if BK2 == 0:
        flat = row * heads + g
    else:
        flat = t * heads + g
    return flat


@triton.jit(do_not_specialize=["total_keys", "splits"])
def backward_keys(
    q_ptr, q2_ptr, do_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr, shift_ptr, dot_ptr, tiles_ptr, natural_scale, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, heads, total_keys, splits,
    GROUP: tl.constexpr, KIND: tl.constexpr, A: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values over one part of the queries: dk, dv [splits, total_keys, Hkv, D].

    INIT: keys below this position belong to another launch (FORCED), keys at or above it to none (INITIAL).
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tiles_ptr + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start, length, key_first = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if KIND == 0:
        key_start, keys = tl.load(tile + 4), tl.load(tile + 5)
    else:
        key_start, keys = start, length
    if KIND == 3:
        keys = tl.minimum(keys, INIT)
    key_last = tl.minimum(key_first + KEYS, keys)
    column = key_first + tl.arange(0, KEYS)
    key_ok = column < keys
    at = (key_start + column).to(tl.int64)
    k = load_row_parts(k_ptr, at * k_t + kv_head * k_h, key_ok, DK, BK, BK2)
    v = load_rows(v_ptr, at * v_t + kv_head * v_h, key_ok, DV, BV)
    dk = zero_parts(KEYS, DK, BK, BK2)
    dv = tl.zeros([KEYS, BV], tl.float32)
    r = tl.arange(0, ROWS)
    g = kv_head * GROUP + r % GROUP
    low, high, full = query_range(key_first, key_last, length, KIND, A, B)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), QUERIES) * QUERIES
        low = low + split * share
        high = tl.minimum(high, low + share)
    # Queries from `middle` on see all keys of the tile.
    middle = tl.minimum(low + tl.cdiv(tl.maximum(full - low, 0), QUERIES) * QUERIES, tl.maximum(high, low))
    for first in range(low, middle, QUERIES):
        t = first + r // GROUP
        ok = (r // GROUP < QUERIES) & (t < high)
        row = (start + t).to(tl.int64)
        flat = flat_rows(start + t, row, heads, g, BK2)
        q = load_queries(
            q_ptr, q2_ptr, start + first, row, ok, g, kv_head * GROUP, q_t, q_h, TMA, QUERIES, GROUP, DK, BK, BK2
        )
        do = load_query_tile(
            do_ptr, start + first, row, ok, g, kv_head * GROUP, heads * DV, DV, TMA, QUERIES, GROUP, DV, BV
        )
        shift = tl.load(shift_ptr + flat, mask=ok, other=float("inf"))
        dot = tl.load(dot_ptr + flat, mask=ok, other=0.0)
        if KIND == 3:
            visible = column[:, None] <= t[None, :]
        else:
            key_low, key_high = key_range(t, KIND, A, B)
            visible = (column[:, None] >= key_low[None, :]) & (column[:, None] < key_high[None, :])
        dk, dv = keys_step(k, v, dk, dv, q, do, scale, shift, dot, visible, True, PREC)
    for first in range(middle, high, QUERIES):
        t = first + r // GROUP
        ok = (r // GROUP < QUERIES) & (t < high)
        row = (start + t).to(tl.int64)
        flat = flat_rows(start + t, row, heads, g, BK2)
        q = load_queries(
            q_ptr, q2_ptr, start + first, row, ok, g, kv_head * GROUP, q_t, q_h, TMA, QUERIES, GROUP, DK, BK, BK2
        )
        do = load_query_tile(
            do_ptr, start + first, row, ok, g, kv_head * GROUP, heads * DV, DV, TMA, QUERIES, GROUP, DV, BV
        )
        shift = tl.load(shift_ptr + flat, mask=ok, other=float("inf"))
        dot = tl.load(dot_ptr + flat, mask=ok, other=0.0)
        dk, dv = keys_step(k, v, dk, dv, q, do, scale, shift, dot, key_ok[:, None], False, PREC)
    kv_heads = heads // GROUP
    if KIND == 3:
        at = (tl.load(tile + 4) + column).to(tl.int64)
    to = (split.to(tl.int64) * total_keys + at) * kv_heads + kv_head
    store_row_parts(dk_ptr, to * DK, key_ok, scale_parts(dk, natural_scale), DK, BK, BK2)
    store_rows(dv_ptr, to * DV, key_ok, dv, DV, BV)
