"""Choice of selection blocks: importance from the compressed attention, then the highest of each query.

Importance is held for a chunk of queries at a time, never for all pairs of queries and blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.kernels.nsa.config import NSAConfig
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend.common import LOG2E, Tiles, exact, pad_dim, precision
from plumbline.kernels.nsa.triton_backend.dense import key_range
from plumbline.kernels.nsa.triton_backend.parts import dot_parts, load_row_parts, widths
from plumbline.kernels.nsa.triton_backend.tables import query_tiles

# Bytes of importance held at once.
CHUNK_BYTES = 2**28


@triton.jit
def add_importance(
    buffer_ptr, p, to, j0, own, ok, jj, m, spill_stride,
    PER: tl.constexpr, RATIO: tl.constexpr, SPILL: tl.constexpr, PER2: tl.constexpr, NS: tl.constexpr,
    QUERIES: tl.constexpr, GROUP2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores what a tile's probabilities [ROWS, PER2 NS] (columns: m-major) give to selection blocks j0 + jj + spill.

    Block i = PER j + m counts for selection block j + s as often as there are pairs (a, b), 0 <= a < PER,
    0 <= b < RATIO,
    with a - b = m - PER s.
    """
    for s in tl.static_range(SPILL + 1):
        offset = m - PER * s
        pairs = tl.maximum(tl.minimum(offset + RATIO, PER) - tl.maximum(offset, 0), 0).to(tl.float32)
        part = tl.sum(tl.reshape(p * pairs[None, :], [ROWS, PER2, NS]), 1)
        part = tl.sum(tl.reshape(part, [QUERIES, GROUP2, NS]), 1)
        j = j0 + jj + s
        keep = ok[:, None] & (j[None, :] <= own[:, None])
        tl.store(buffer_ptr + s * spill_stride + to[:, None] + j[None, :], part, mask=keep)


@triton.jit
def importance(
    q_ptr, k_ptr, lse_ptr, buffer_ptr, tiles_ptr, scale, q_t, q_h, k_t, k_h, heads, spill_stride, width,
    GROUP: tl.constexpr, GROUP2: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    SPILL: tl.constexpr, PER2: tl.constexpr, NS: tl.constexpr,
    DK: tl.constexpr, BK: tl.constexpr, BK2: tl.constexpr, ROWS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """buffer [SPILL + 1, tiles, QUERIES, Hkv, width]: importance summed over the group, in SPILL + 1 terms."""
    QUERIES: tl.constexpr = ROWS // GROUP2
    PER: tl.constexpr = S // D
    KEYS: tl.constexpr = PER2 * NS
    tile = tiles_ptr + tl.program_id(0) * 6
    kv_head = tl.program_id(1)
    kv_heads = heads // GROUP
    start, first, end = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    key_start, keys = tl.load(tile + 4), tl.load(tile + 5)
    r = tl.arange(0, ROWS)
    t = first + r // GROUP2
    ok = (r % GROUP2 < GROUP) & (t < end)
    head = kv_head * GROUP + r % GROUP2
    row = (start + t).to(tl.int64)
    q = load_row_parts(q_ptr, row * q_t + head * q_h, ok, DK, BK, BK2)
    lse = tl.load(lse_ptr + row * heads + head, mask=ok, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    _, high = key_range(t, 0, L, D)
    _, high_first = key_range(first, 0, L, D)

    n = tl.arange(0, QUERIES)
    query_ok = first + n < end
    own = (first + n) // S
    to = ((tl.program_id(0) * QUERIES + n).to(tl.int64) * kv_heads + kv_head) * width
    c = tl.arange(0, KEYS)
    m = c // NS
    jj = tl.arange(0, NS)
    last_own = (end - 1) // S
    body_end = tl.minimum(high_first // PER // NS * NS, last_own + 1)
    for j0 in range(0, body_end, NS):
        i = PER * (j0 + c % NS) + m
        if PER == PER2:
            k = load_row_parts(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, c < KEYS, DK, BK, BK2)
        else:
            k = load_row_parts(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, m < PER, DK, BK, BK2)
        s = dot_parts(q, k, PREC)
        p = tl.exp2(s * scale - lse[:, None])
        if PER != PER2:
            p = tl.where((m < PER)[None, :], p, 0.0)
        add_importance(
            buffer_ptr,
            p,
            to,
            j0,
            own,
            query_ok,
            jj,
            m,
            spill_stride,
            PER,
            L // D,
            SPILL,
            PER2,
            NS,
            QUERIES,
            GROUP2,
            ROWS,
        )
    for j0 in range(body_end, last_own + 1, NS):
        i = PER * (j0 + c % NS) + m
        there = (i < keys) & (m < PER)
        k = load_row_parts(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, there, DK, BK, BK2)
        s = dot_parts(q, k, PREC)
        p = tl.exp2(s * scale - lse[:, None])
        p = tl.where((i[None, :] < high[:, None]) & (m < PER)[None, :], p, 0.0)
        add_importance(
            buffer_ptr,
            p,
            to,
            j0,
            own,
            query_ok,
            jj,
            m,
            spill_stride,
            PER,
            L // D,
            SPILL,
            PER2,
            NS,
            QUERIES,
            GROUP2,
            ROWS,
        )


@triton.jit
def highest(x, floor, WANT: tl.constexpr):
    """bool: the WANT highest of the values above floor (all, if fewer), equal ones by lower index. int32, not -1."""
    # Drop the lowest while enough remain.
    kept = tl.sum((x > floor).to(tl.int32), 0)
    more = kept > WANT
    while more:
        low = tl.min(tl.where(x > floor, x, 2147483647), 0)
        rest = tl.sum((x > low).to(tl.int32), 0)
        enough = rest >= WANT
        floor = tl.where(enough, low, floor)
        more = enough & (rest > WANT)
    last = tl.min(tl.where(x > floor, x, 2147483647), 0)
    above = x > last
    level = x == last
    wanted = WANT - tl.sum(above.to(tl.int32), 0)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= wanted))


@triton.jit
def store_chosen(
    scratch_ptr, out_ptr, x, own,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, COUNT2: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """out [COUNT]: the forced ones of the blocks up to own, and the highest of the rest by importance x [WIDTH].

    Equal values go to the lower index; ascending, then -1. scratch: 128 words, if WIDTH is 256 or more.
    """
    WANT: tl.constexpr = COUNT - INITIAL - LOCAL
    FEW: tl.constexpr = 64
    # Shorter rows are ranked where they are.
    MOVE: tl.constexpr = WIDTH >= 256
    j = tl.arange(0, WIDTH)
    initial = tl.minimum(own + 1, INITIAL)
    local = tl.maximum(own - LOCAL + 1, initial)
    free = (j >= initial) & (j < local)
    # Importance is not negative, so that its bits are ordered as the values are; -1 marks what is not to be ranked.
    x = tl.where(free, tl.maximum(x, 0.0).to(tl.int32, bitcast=True), -1)
    floor = tl.full([], -1, tl.int32)
    n = tl.full([], WIDTH + FEW, tl.int32)
    if (WANT > 0) & (WANT <= 24) & (WIDTH >= 64):
        # The WANT-th highest of the maxima of 32 groups is a bound from below that few values pass.
        best = tl.max(tl.reshape(x, [WIDTH // 32, 32]), 0)
        taken = tl.full([], 0, tl.int32)
        for _ in range(WANT):
            top = tl.max(best, 0)
            floor = tl.where(taken < WANT, top - 1, floor)
            hit = best == top
            taken += tl.sum(hit.to(tl.int32), 0)
            best = tl.where(hit, -1, best)
        floor = tl.maximum(floor, -1)
        if MOVE:
            n = tl.sum((x > floor).to(tl.int32), 0)
    c = tl.arange(0, COUNT2)
    if n <= FEW:
        # Those few, in order, are ranked by themselves.
        place = tl.cumsum((x > floor).to(tl.int32), 0) - 1
        tl.debug_barrier()
        tl.store(scratch_ptr + place, x, mask=x > floor)
        tl.store(scratch_ptr + FEW + place, j, mask=x > floor)
        tl.debug_barrier()
        f = tl.arange(0, FEW)
        few = tl.load(scratch_ptr + f, mask=f < n, other=-1)
        few_j = tl.load(scratch_ptr + FEW + f, mask=f < n, other=0)
        few_chosen = highest(few, floor, WANT)
        middle = tl.sum(few_chosen.to(tl.int32), 0)
        tl.store(out_ptr + initial + tl.cumsum(few_chosen.to(tl.int32), 0) - 1, few_j, mask=few_chosen)
    else:
        chosen = (x > -1) & highest(x, floor, WANT)
        middle = tl.sum(chosen.to(tl.int32), 0)
        tl.store(out_ptr + initial + tl.cumsum(chosen.to(tl.int32), 0) - 1, j, mask=chosen)
    forced = tl.where(c < initial, c, tl.where(c - initial - middle <= own - local, c - initial - middle + local, -1))
    tl.store(out_ptr + c, forced, mask=(c < COUNT) & ((c < initial) | (c >= initial + middle)))


@triton.jit
def choose(
    buffer_ptr, out_ptr, tiles_ptr, kv_heads, spill_stride, width,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, SPILL: tl.constexpr, S: tl.constexpr,
    COUNT: tl.constexpr, COUNT2: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """out [T, Hkv, COUNT]: the chosen blocks of one query. Overwrites its importance."""
    tile_number = tl.program_id(0) // QUERIES
    kv_head = tl.program_id(1)
    tile = tiles_ptr + tile_number * 6
    start, first, end = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    n = tl.program_id(0) % QUERIES
    t = first + n
    if t < end:
        own = t // S
        j = tl.arange(0, WIDTH)
        at = ((tile_number * QUERIES + n).to(tl.int64) * kv_heads + kv_head) * width
        x = tl.load(buffer_ptr + at + j, mask=j <= own, other=0.0)
        for s in tl.static_range(1, SPILL + 1):
            x += tl.load(buffer_ptr + s * spill_stride + at + j, mask=(j <= own) & (j >= s), other=0.0)
        scratch = (buffer_ptr + at).to(tl.pointer_type(tl.int32), bitcast=True)
        out = out_ptr + ((start + t).to(tl.int64) * kv_heads + kv_head) * COUNT
        store_chosen(scratch, out, x, own, WIDTH, COUNT, COUNT2, INITIAL, LOCAL)


def score_tiles(x: Tensor, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(max(32, group), 32, 4, 1)
    if pad_dim(x.shape[-1]) <= 64:
        return Tiles(max(64, group), 128, 4, 2)
    # Wider than 128, a multiprocessor holds two tiles instead of three.
    return Tiles(max(128, group), 64, 8 if widths(x.shape[-1])[0] == 128 < x.shape[-1] else 4, 2)


def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, layout: Layout, config: NSAConfig, scale: float) -> Tensor:
    """q [T, Hq, D], k_cmp [N, Hkv, D] packed, lse [T, Hq] in log 2 -> [T, Hkv, count] int32."""
    heads, kv_heads, dim = q.shape[1], k_cmp.shape[1], q.shape[2]
    group = heads // kv_heads
    group2 = triton.next_power_of_2(group)
    per = config.select_block // config.stride
    spill = -(-(config.block // config.stride - 1) // per)
    per2 = triton.next_power_of_2(per)
    tile = score_tiles(q, group2)
    # Dots need at least 16 columns.
    ns = max(tile.keys // per2, -(-16 // per2))
    queries = tile.rows // group2
    tiles = query_tiles(layout, queries, config.block, config.stride)[0]
    width = triton.next_power_of_2(-(-layout.longest // config.select_block))
    out = torch.empty(q.shape[0], kv_heads, config.count, dtype=torch.int32, device=q.device)
    per_tile = (spill + 1) * queries * kv_heads * width * 4
    at_once = max(1, min(len(tiles), CHUNK_BYTES // per_tile))
    buffer = torch.empty(spill + 1, at_once, queries, kv_heads, width, dtype=torch.float32, device=q.device)
    warps = max(1, min(8, width // 1024))
    bk, bk2 = widths(dim)
    for first in range(0, len(tiles), at_once):
        chunk = tiles[first : first + at_once]
        importance[(len(chunk), kv_heads)](
            q, k_cmp, lse, buffer, chunk, scale * LOG2E, q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1),
            heads, buffer.stride(0), width, GROUP=group, GROUP2=group2, L=config.block, D=config.stride,
            S=config.select_block,
            SPILL=spill, PER2=per2, NS=ns, DK=dim, BK=bk, BK2=bk2, ROWS=tile.rows, PREC=precision(q.dtype),
            **tile.launch,
        )  # fmt: skip
        choose[(len(chunk) * queries, kv_heads)](
            buffer, out, chunk, kv_heads, buffer.stride(0), width, QUERIES=queries, WIDTH=width, SPILL=spill,
            S=config.select_block, COUNT=config.count, COUNT2=triton.next_power_of_2(config.count),
            INITIAL=config.initial, LOCAL=config.local, num_warps=warps,
        )  # fmt: skip
    return out
