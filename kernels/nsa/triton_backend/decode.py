"""Decoding: new tokens against a cache in slots or pages, split over keys. Four launches, none of which asks the host.

    append    new keys and values into the cache; compression blocks that they complete
    scan      each part of the compressed keys, and of the window, by itself: output, and what each selection block gets
    decide    the parts put together: the chosen blocks, and the compressed and window branches, gated
    selected  each part of the chosen blocks by itself; the last one of a head to finish puts them together

A program holds all heads of a group against one tile of keys; lengths are read on the device and parts past a
sequence's end return at once, so that a launch for the longest sequence serves all, and a CUDA graph all steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.kernels.nsa.cache import BRANCHES, DecodePlan, NSAStores
from plumbline.kernels.nsa.config import PhiParams, key_position
from plumbline.kernels.nsa.triton_backend.common import (
    LOG2E,
    exact,
    load_rows,
    pad_dim,
    placed,
    precision,
    rows_contiguous,
)
from plumbline.kernels.nsa.triton_backend.phi import append, second_layer
from plumbline.kernels.nsa.triton_backend.scores import store_chosen

# Selection blocks whose importance one step of `decide` sums over the group, and columns of output a program merges.
SUMMED_AT_ONCE = 2**11
MERGED_COLUMNS = 32
# Keys of a part; where they are wide (float32, or head dims over 128).
KEYS, WIDE_KEYS = 128, 64


@triton.jit
def cached_rows(
    table, at, ok, size, stride_p, stride_h, head, ROW: tl.constexpr, PAGED: tl.constexpr, RING: tl.constexpr = 0
):  # fmt: skip
    """Element offsets of rows `at` of a sequence in a store [slots or pages, H, size, .] with rows ROW apart."""
    if PAGED:
        slot = tl.load(table + at // size, mask=ok, other=0).to(tl.int64)
        inside = at % size
    else:
        slot = tl.load(table).to(tl.int64)
        inside = placed(at, RING)
    return slot * stride_p + head * stride_h + inside.to(tl.int64) * ROW


@triton.jit
def tile(q, k, v, ok, scale, PREC: tl.constexpr):
    """(logits' maximum, probabilities relative to it, their sum, output) of a tile of keys; log 2."""
    s = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
    s = tl.where(ok[None, :], s, float("-inf"))
    m = tl.max(s, 1)
    p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
    return m, p, tl.sum(p, 1), tl.dot(p.to(v.dtype), v, input_precision=PREC)


@triton.jit
def store_part(o_ptr, m_ptr, l_ptr, part, o, m, denominator, GP: tl.constexpr, BV: tl.constexpr):
    """o [., GP, BV], m and l [., GP] of one part."""
    g = tl.arange(0, GP)
    at = part.to(tl.int64) * GP + g
    tl.store(m_ptr + at, m)
    tl.store(l_ptr + at, denominator)
    tl.store(o_ptr + at[:, None] * BV + tl.arange(0, BV)[None, :], o)


@triton.jit
def part_weights(m_ptr, l_ptr, first, present, PARTS: tl.constexpr, GP: tl.constexpr):
    """[PARTS, GP]: the factor of each part's output in the output of all; zero where there are none."""
    at = (first + tl.arange(0, PARTS))[:, None].to(tl.int64) * GP + tl.arange(0, GP)[None, :]
    m = tl.load(m_ptr + at, mask=present[:, None], other=float("-inf"), cache_modifier=".cg")
    denominator = tl.load(l_ptr + at, mask=present[:, None], other=0.0, cache_modifier=".cg")
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(denominator * weight, 0)
    return weight / tl.where(total == 0.0, 1.0, total)[None, :]


@triton.jit
def merge(o_ptr, m_ptr, l_ptr, number, low, high, g, n, GP: tl.constexpr, BV: tl.constexpr):
    """Output of parts number + [low, high) at heads g and columns n (of one length); zero where they hold nothing.

    In one dimension all loads take one layout, so that threads exchange nothing; maxima and sums are worked out anew
    for every column.
    """
    top = tl.full(n.shape, float("-inf"), tl.float32)
    total = tl.zeros(n.shape, tl.float32)
    out = tl.zeros(n.shape, tl.float32)
    for part in tl.range(low, high, loop_unroll_factor=8):
        at = (number + part).to(tl.int64) * GP + g
        m = tl.load(m_ptr + at, cache_modifier=".cg")
        denominator = tl.load(l_ptr + at, cache_modifier=".cg")
        o = tl.load(o_ptr + at * BV + n, cache_modifier=".cg")
        new = tl.maximum(top, m)
        base = tl.where(new == float("-inf"), 0.0, new)
        old_weight, weight = tl.exp2(top - base), tl.exp2(m - base)
        out = out * old_weight + o * weight
        total = total * old_weight + denominator * weight
        top = new
    return out / tl.where(total == 0.0, 1.0, total)


@triton.jit
def scan(
    q_ptr, kb_ptr, vb_ptr, kw_ptr, vw_ptr, o_ptr, m_ptr, l_ptr, terms_ptr, table_ptr, win_ptr, position_ptr, scale,
    q_t, q_h, table_t, win_t, size_b, kb_p, kb_h, vb_p, vb_h, size_r, kw_p, kw_h, vw_p, vw_h,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    W: tl.constexpr, SPILL: tl.constexpr, PER2: tl.constexpr, NS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr, WIDTH: tl.constexpr, SHIFT: tl.constexpr, WIN_RING: tl.constexpr,
    KR: tl.constexpr, VR: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PAGED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Parts [0, PARTS): NS selection blocks' compressed keys; then WINDOW_PARTS of the window.

    terms [R Hkv, SPILL + 1, GROUP, WIDTH]: what the compressed blocks that start in selection block j give to block
    j + s, relative to the part's maximum.
    """
    PER: tl.constexpr = S // D
    KEYS: tl.constexpr = PER2 * NS
    number = tl.program_id(0)
    part = tl.program_id(1)
    row, head = number // KV_HEADS, number % KV_HEADS
    t = tl.load(position_ptr + row).to(tl.int32)
    g = tl.arange(0, GP)
    c = tl.arange(0, KEYS)
    at = row.to(tl.int64) * q_t + (head * GROUP + g) * q_h
    if part < PARTS:
        j0 = part * NS
        high = tl.where(t >= L - 1, (t - (L - 1)) // D + 1, 0)
        if PER * j0 < high:
            m_, jj = c // NS, c % NS
            i = PER * (j0 + jj) + m_
            ok = (i < high) & (m_ < PER)
            table = table_ptr + row * table_t
            at_k = cached_rows(table, i + SHIFT, ok, size_b, kb_p, kb_h, head, KR, PAGED)
            at_v = cached_rows(table, i + SHIFT, ok, size_b, vb_p, vb_h, head, VR, PAGED)
            k = load_rows(kb_ptr, at_k, ok, DK, BK)
            v = load_rows(vb_ptr, at_v, ok, DV, BV)
            q = load_rows(q_ptr, at, g < GROUP, DK, BK)
            m, p, denominator, o = tile(q, k.to(q.dtype), v.to(q.dtype), ok, scale, PREC)
            store_part(
                o_ptr, m_ptr, l_ptr, number * (PARTS + WINDOW_PARTS) + part, o, m, denominator, GP, BV
            )  # fmt: skip
            j = j0 + tl.arange(0, NS)
            for s in tl.static_range(SPILL + 1):
                # As in scores.add_importance.
                offset = m_ - PER * s
                pairs = tl.maximum(tl.minimum(offset + L // D, PER) - tl.maximum(offset, 0), 0).to(tl.float32)
                term = tl.sum(tl.reshape(p * pairs[None, :], [GP, PER2, NS]), 1)
                to = ((number * (SPILL + 1) + s).to(tl.int64) * GROUP + g) * WIDTH
                tl.store(terms_ptr + to[:, None] + j[None, :], term, mask=(g < GROUP)[:, None] & (j < WIDTH)[None, :])
    else:
        first = t - W + 1 + (part - PARTS) * KEYS
        if (first + KEYS > 0) & (first <= t):
            ok = (first + c >= 0) & (first + c <= t)
            win = win_ptr + row * win_t
            at_k = cached_rows(win, first + c, ok, size_r, kw_p, kw_h, head, KR, PAGED, WIN_RING)
            at_v = cached_rows(win, first + c, ok, size_r, vw_p, vw_h, head, VR, PAGED, WIN_RING)
            k = load_rows(kw_ptr, at_k, ok, DK, BK)
            v = load_rows(vw_ptr, at_v, ok, DV, BV)
            q = load_rows(q_ptr, at, g < GROUP, DK, BK)
            m, p, denominator, o = tile(q, k.to(q.dtype), v.to(q.dtype), ok, scale, PREC)
            store_part(
                o_ptr, m_ptr, l_ptr, number * (PARTS + WINDOW_PARTS) + part, o, m, denominator, GP, BV
            )  # fmt: skip


@triton.jit
def decide(
    o_ptr, m_ptr, l_ptr, terms_ptr, factor_ptr, sums_ptr, gates_ptr, mixed_ptr, indices_ptr, position_ptr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    W: tl.constexpr, SPILL: tl.constexpr, NS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
    WINDOW_PARTS: tl.constexpr, WIDTH: tl.constexpr,
    COUNT: tl.constexpr, COUNT2: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, BV: tl.constexpr,
    SLICE: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Program (., 0): indices [R, Hkv, COUNT]; the others: a slice of mixed [R Hkv, GP, BV] float32."""
    PER: tl.constexpr = S // D
    number = tl.program_id(0)
    row, head = number // KV_HEADS, number % KV_HEADS
    t = tl.load(position_ptr + row).to(tl.int32)
    high = tl.where(t >= L - 1, (t - (L - 1)) // D + 1, 0)
    g = tl.arange(0, GP)
    first = number * (PARTS + WINDOW_PARTS)
    used = (high + NS * PER - 1) // (NS * PER)
    if tl.program_id(1) == 0:
        part = tl.arange(0, PARTS)
        weight = part_weights(m_ptr, l_ptr, first, part < used, PARTS, GP)
        factor = factor_ptr + number.to(tl.int64) * PARTS * GP
        tl.store(factor + part[:, None] * GP + g[None, :], weight)
        tl.debug_barrier()
        terms = terms_ptr + number.to(tl.int64) * (SPILL + 1) * GROUP * WIDTH
        sums = sums_ptr + number.to(tl.int64) * (SPILL + 1) * WIDTH
        for j0 in range(0, tl.minimum(used * NS, WIDTH), SOME):
            at = j0 + tl.arange(0, SOME)
            ok = (at < used * NS) & (at < WIDTH)
            for s in tl.static_range(SPILL + 1):
                gives = tl.zeros([SOME], tl.float32)
                for h in tl.range(0, GROUP, loop_unroll_factor=8):
                    term = tl.load(terms + (s * GROUP + h) * WIDTH + at, mask=ok, other=0.0)
                    gives += term * tl.load(factor + at // NS * GP + h, mask=ok, other=0.0)
                tl.store(sums + s * WIDTH + at, gives, mask=ok)
        # What selection block j - s gives to j lies at j - s: the way back through memory moves it.
        tl.debug_barrier()
        own = t // S
        j = tl.arange(0, WIDTH)
        x = tl.zeros([WIDTH], tl.float32)
        for s in tl.static_range(SPILL + 1):
            given = (j >= s) & (j <= own) & (j - s < used * NS)
            x += tl.load(sums + s * WIDTH + j - s, mask=given, other=0.0)
        scratch = terms.to(tl.pointer_type(tl.int32), bitcast=True)
        chosen_ptr = indices_ptr + number.to(tl.int64) * COUNT
        store_chosen(scratch, chosen_ptr, x, own, WIDTH, COUNT, COUNT2, INITIAL, LOCAL)
    else:
        e = tl.arange(0, GP * SLICE)
        row_g, n = e // SLICE, (tl.program_id(1) - 1) * SLICE + e % SLICE
        gate = gates_ptr + (row.to(tl.int64) * KV_HEADS * GROUP + head * GROUP + row_g) * 3
        real = row_g < GROUP
        out = merge(o_ptr, m_ptr, l_ptr, first, 0, used, row_g, n, GP, BV)
        out = out * tl.load(gate, mask=real, other=0.0).to(tl.float32)
        # Parts of the window that lie before the sequence's start hold nothing.
        low = tl.maximum(W - 1 - t, 0) // KEYS
        win = merge(o_ptr, m_ptr, l_ptr, first + PARTS, low, WINDOW_PARTS, row_g, n, GP, BV)
        out += win * tl.load(gate + 2, mask=real, other=0.0).to(tl.float32)
        tl.store(mixed_ptr + (number.to(tl.int64) * GP + row_g) * BV + n, out)


@triton.jit
def selected(
    q_ptr, k_ptr, v_ptr, o_ptr, m_ptr, l_ptr, tickets_ptr, gates_ptr, mixed_ptr, indices_ptr, out_ptr, table_ptr,
    position_ptr, scale, q_t, q_h, table_t, size, k_p, k_h, v_p, v_h,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GP: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr,
    SLOTS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, KR: tl.constexpr, VR: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PAGED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """SLOTS chosen blocks a program; out [R, Hq, Dv]."""
    number = tl.program_id(0)
    part = tl.program_id(1)
    row, head = number // KV_HEADS, number % KV_HEADS
    t = tl.load(position_ptr + row).to(tl.int32)
    table = table_ptr + row * table_t
    g = tl.arange(0, GP)
    c = tl.arange(0, KEYS)
    slot = part * SLOTS + c // S
    ok = (c < SLOTS * S) & (slot < COUNT)
    j = tl.load(indices_ptr + number.to(tl.int64) * COUNT + slot, mask=ok, other=-1)
    token = j * S + c % S
    ok = ok & (j >= 0) & (token <= t)
    k = load_rows(k_ptr, cached_rows(table, token, ok, size, k_p, k_h, head, KR, PAGED), ok, DK, BK)
    v = load_rows(v_ptr, cached_rows(table, token, ok, size, v_p, v_h, head, VR, PAGED), ok, DV, BV)
    q = load_rows(q_ptr, row.to(tl.int64) * q_t + (head * GROUP + g) * q_h, g < GROUP, DK, BK)
    m, _, denominator, o = tile(q, k.to(q.dtype), v.to(q.dtype), ok, scale, PREC)
    store_part(o_ptr, m_ptr, l_ptr, number * PARTS + part, o, m, denominator, GP, BV)
    # All threads' stores come before the ticket, and the ticket before what the last program reads.
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr + number, 1, sem="acq_rel", scope="gpu")
    if ticket == PARTS - 1:
        tl.store(tickets_ptr + number, 0)
        e = tl.arange(0, GP * BV)
        row_g, n = e // BV, e % BV
        flat = row.to(tl.int64) * KV_HEADS * GROUP + head * GROUP + row_g
        out = merge(o_ptr, m_ptr, l_ptr, number * PARTS, 0, PARTS, row_g, n, GP, BV)
        out *= tl.load(gates_ptr + flat * 3 + 1, mask=row_g < GROUP, other=0.0).to(tl.float32)
        out += tl.load(mixed_ptr + number.to(tl.int64) * GP * BV + e)
        real = (row_g < GROUP) & (n < DV)
        tl.store(out_ptr + flat * DV + n, out.to(out_ptr.dtype.element_ty), mask=real)


def decode(
    q: Tensor, kv_cmp: tuple[Tensor, Tensor], kv_slc: tuple[Tensor, Tensor], kv_win: tuple[Tensor, Tensor],
    gates: Tensor, cache: NSAStores, plan: DecodePlan, params: PhiParams, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [R, Hq, Dv], blocks chosen [R, Hkv, count] int32); see decode_step."""
    config, (rows, heads, dk) = cache.config, q.shape
    kv_heads, dv = kv_cmp[0].shape[1], kv_cmp[1].shape[2]
    group, bk, bv = heads // kv_heads, pad_dim(dk), pad_dim(dv)
    gp = max(16, triton.next_power_of_2(group))
    q, gates = rows_contiguous(q), gates.contiguous()
    tables = plan.tables
    strides = row_strides(cache)
    append_tokens(kv_cmp, kv_slc, kv_win, cache, plan, params, strides)

    wide = exact(q.dtype) or max(bk, bv) > 128
    per2 = triton.next_power_of_2(config.select_block // config.stride)
    ns = max((WIDE_KEYS if wide else KEYS) // per2, -(-16 // per2))
    keys = per2 * ns
    # Powers of two, so that growing sequences meet few compiled kernels; parts past a sequence's end return at once.
    parts, window_parts = triton.next_power_of_2(triton.cdiv(plan.candidates, ns)), triton.cdiv(config.window, keys)
    width = max(16, triton.next_power_of_2(plan.candidates))
    spill = -(-(config.block // config.stride - 1) // (config.select_block // config.stride))
    slots = max(1, (WIDE_KEYS if wide else KEYS) // config.select_block)
    select_parts = triton.cdiv(config.count, slots)
    number = rows * kv_heads

    def make() -> tuple[Tensor, ...]:
        def floats(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.float32, device=q.device)

        most = max(parts + window_parts, select_parts)
        return (
            floats(number, most, gp, bv), floats(number, most, gp), floats(number, most, gp),
            floats(number, spill + 1, group, width), floats(number, parts, gp), floats(number, spill + 1, width),
            floats(number, gp, bv),
            torch.zeros(number, dtype=torch.int32, device=q.device),
        )  # fmt: skip

    o, m, denominator, terms, factor, sums, mixed, tickets = plan.scratch((number, group, bv, q.device), make)
    indices = torch.empty(rows, kv_heads, config.count, dtype=torch.int32, device=q.device)
    out = torch.empty(rows, heads, dv, dtype=q.dtype, device=q.device)
    (k_blocks, v_blocks), (k_slc, v_slc), (k_win, v_win) = cache.blocks, cache.raw["slc"], cache.raw["win"]
    common = {"KV_HEADS": kv_heads, "GROUP": group, "GP": gp}
    dims = {"DK": dk, "DV": dv, "BK": bk, "BV": bv, "PAGED": plan.page is not None, "PREC": precision(q.dtype)}
    dims |= strides
    sizes = {"L": config.block, "D": config.stride, "S": config.select_block, "W": config.window, "SPILL": spill}
    scan[(number, parts + window_parts)](
        q, k_blocks, v_blocks, k_win, v_win, o, m, denominator, terms, tables["blocks"], tables["win"], plan.position,
        scale * LOG2E, q.stride(0), q.stride(1), tables["blocks"].stride(0), tables["win"].stride(0),
        k_blocks.shape[2], *k_blocks.stride()[:2], *v_blocks.stride()[:2],
        k_win.shape[2], *k_win.stride()[:2], *v_win.stride()[:2], **common, **sizes, PER2=per2, NS=ns, PARTS=parts,
        WINDOW_PARTS=window_parts, WIDTH=width, SHIFT=cache.shift, WIN_RING=cache.rings.get("win", 0), **dims,
        num_warps=8,
    )  # fmt: skip
    columns = min(bv, MERGED_COLUMNS)
    decide[(number, 1 + bv // columns)](
        o, m, denominator, terms, factor, sums, gates, mixed, indices, plan.position, **common, **sizes, NS=ns,
        KEYS=keys, PARTS=parts, WINDOW_PARTS=window_parts, WIDTH=width, COUNT=config.count,
        COUNT2=triton.next_power_of_2(config.count), INITIAL=config.initial, LOCAL=config.local, BV=bv, SLICE=columns,
        SOME=min(width, SUMMED_AT_ONCE), num_warps=8,
    )  # fmt: skip
    selected[(number, select_parts)](
        q, k_slc, v_slc, o, m, denominator, tickets, gates, mixed, indices, out, tables["slc"], plan.position,
        scale * LOG2E, q.stride(0), q.stride(1), tables["slc"].stride(0), k_slc.shape[2], *k_slc.stride()[:2],
        *v_slc.stride()[:2], **common, S=config.select_block, COUNT=config.count, SLOTS=slots,
        KEYS=max(16, triton.next_power_of_2(slots * config.select_block)), PARTS=select_parts,
        **dims, num_warps=8,
    )  # fmt: skip
    return out, indices


def row_strides(cache: NSAStores) -> dict[str, int]:
    """Elements from one row of keys, and of values, to the next. ValueError: stores laid out in different ways."""
    pages = {k.shape[2] for k, _ in cache.raw.values()} if cache.page is not None else {0}
    rows = {(k.stride(2), v.stride(2)) for k, v in (*cache.raw.values(), cache.blocks)}
    last = {x.stride(3) for pair in (*cache.raw.values(), cache.blocks) for x in pair}
    if len(pages) != 1 or len(rows) != 1 or last != {1}:
        raise ValueError("the kernels need raw pages of one size, and rows of one stride without gaps")
    [(k, v)] = rows
    return {"KR": k, "VR": v}


def append_tokens(
    kv_cmp: tuple[Tensor, Tensor], kv_slc: tuple[Tensor, Tensor], kv_win: tuple[Tensor, Tensor], cache: NSAStores,
    plan: DecodePlan, params: PhiParams, strides: dict[str, int],
) -> None:  # fmt: skip
    """New keys and values, and the compression blocks that they complete, into the cache. strides: row_strides's."""
    config, tables = cache.config, plan.tables
    rows, kv_heads, dk = kv_cmp[0].shape
    dv = kv_cmp[1].shape[2]
    inputs = [rows_contiguous(x) for pair in (kv_cmp, kv_slc, kv_win) for x in pair]
    stores = [x for branch in BRANCHES for x in cache.raw[branch]]
    kind = {"linear": 0, "mean": 1, "mlp": 2}[config.phi]
    position = key_position(params.k_position, config)
    k_weight, v_weight, v_position = (x.contiguous() for x in (params.k_weight, params.v_weight, params.v_position))
    k_position = position.contiguous() if position is not None else v_position
    hidden = torch.empty(
        (2, rows, kv_heads, max(dk, dv)) if kind == 2 else (1,), dtype=torch.float32, device=kv_cmp[0].device
    )
    tile = 16
    tiles = (triton.cdiv(dk, tile), triton.cdiv(dv, tile))
    k_blocks, v_blocks = cache.blocks
    table = tables["blocks"]
    raw_tables = [tables[branch] for branch in BRANCHES]
    shared = (table, plan.position, table.stride(0), k_blocks.shape[2], *k_blocks.stride()[:2], *v_blocks.stride()[:2])
    sizes = {"KV_HEADS": kv_heads, "L": config.block, "D": config.stride, "PAGED": plan.page is not None}
    sizes |= strides | {"SHIFT": cache.shift}
    append[(rows, kv_heads, 1 + sum(tiles))](
        *inputs, *(stride for x in inputs for stride in x.stride()[:2]), *stores, stores[0].shape[2],
        *(stride for x in stores for stride in x.stride()[:2]), k_weight, k_position, v_weight, v_position, k_blocks,
        v_blocks, hidden, *raw_tables, *(x.stride(0) for x in raw_tables), *shared, **sizes, NEW=plan.new,
        CMP_RING=cache.rings.get("cmp", 0), WIN_RING=cache.rings.get("win", 0), KIND=kind,
        HAS_KEY_POSITION=position is not None, DK=dk, DV=dv,
        BK=pad_dim(dk), BV=pad_dim(dv), K_TILES=tiles[0], TILE=tile, CHUNK=8, num_warps=16,
    )  # fmt: skip
    if kind == 2:
        second_layer[(rows, kv_heads, sum(tiles))](
            hidden, k_weight, v_weight, k_blocks, v_blocks, *shared, **sizes, DK=dk, DV=dv, BK=pad_dim(dk),
            BV=pad_dim(dv), DIM=max(dk, dv), K_TILES=tiles[0], TILE=tile, num_warps=4,
        )  # fmt: skip
