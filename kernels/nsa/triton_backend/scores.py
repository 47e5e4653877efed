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
from plumbline.kernels.nsa.triton_backend.common import LOG2E, Tiles, exact, load_rows, pad_dim, precision
from plumbline.kernels.nsa.triton_backend.dense import key_range
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
    DK: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, PREC: tl.constexpr,
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
    q = load_rows(q_ptr, row * q_t + head * q_h, ok, DK, BK)
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
            k = load_rows(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, c < KEYS, DK, BK)
        else:
            k = load_rows(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, m < PER, DK, BK)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
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
        k = load_rows(k_ptr, (key_start + i).to(tl.int64) * k_t + kv_head * k_h, there, DK, BK)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
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
def choose(
    buffer_ptr, out_ptr, tiles_ptr, kv_heads, spill_stride, width,
    QUERIES: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, SPILL: tl.constexpr, S: tl.constexpr,
    COUNT: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """out [T, Hkv, COUNT]: forced blocks and the highest of the rest, ascending, -1 = none. PART queries a program."""
    per_tile: tl.constexpr = QUERIES // PART
    tile_number = tl.program_id(0) // per_tile
    kv_head = tl.program_id(1)
    tile = tiles_ptr + tile_number * 6
    start, first, end = tl.load(tile), tl.load(tile + 2), tl.load(tile + 3)
    n = tl.program_id(0) % per_tile * PART + tl.arange(0, PART)
    t = first + n
    ok = t < end
    own = t // S
    j = tl.arange(0, WIDTH)
    candidate = ok[:, None] & (j[None, :] <= own[:, None])
    at = ((tile_number * QUERIES + n).to(tl.int64) * kv_heads + kv_head) * width
    x = tl.zeros([PART, WIDTH], tl.float32)
    for s in tl.static_range(SPILL + 1):
        x += tl.load(
            buffer_ptr + s * spill_stride + at[:, None] + j[None, :], mask=candidate & (j >= s)[None, :], other=0.0
        )
    forced = candidate & ((j < INITIAL)[None, :] | (j[None, :] > own[:, None] - LOCAL))
    # Importance is not negative, so that -1 marks what cannot be chosen (any more).
    x = tl.where(candidate & (forced == 0), x, -1.0)
    # The value of the last one chosen: equal values are taken away together, and counted.
    rest = x
    last = tl.full([PART], 0.0, tl.float32)
    taken = tl.zeros([PART], tl.int32)
    for _ in range(COUNT - INITIAL - LOCAL):
        top = tl.max(rest, 1)
        last = tl.where(taken < COUNT - INITIAL - LOCAL, top, last)
        hit = rest == top[:, None]
        taken += tl.sum(hit.to(tl.int32), 1)
        rest = tl.where(hit, -1.0, rest)
    above = x > last[:, None]
    level = (x == last[:, None]) & (x >= 0.0)
    wanted = COUNT - INITIAL - LOCAL - tl.sum(above.to(tl.int32), 1)
    chosen = forced | above | (level & (tl.cumsum(level.to(tl.int32), 1) <= wanted[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    to = ((start + t).to(tl.int64) * kv_heads + kv_head) * COUNT
    tl.store(out_ptr + to[:, None] + place, j[None, :] + tl.zeros([PART, 1], tl.int32), mask=chosen)


def score_tiles(x: Tensor, group: int) -> Tiles:
    return Tiles(max(32, group), 32, 4, 1) if exact(x.dtype) else Tiles(max(128, group), 64, 8, 3)


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
    out = torch.full((q.shape[0], kv_heads, config.count), -1, dtype=torch.int32, device=q.device)
    per_tile = (spill + 1) * queries * kv_heads * width * 4
    at_once = max(1, min(len(tiles), CHUNK_BYTES // per_tile))
    buffer = torch.empty(spill + 1, at_once, queries, kv_heads, width, dtype=torch.float32, device=q.device)
    warps = max(1, min(8, width // 1024))
    for first in range(0, len(tiles), at_once):
        chunk = tiles[first : first + at_once]
        importance[(len(chunk), kv_heads)](
            q, k_cmp, lse, buffer, chunk, scale * LOG2E, q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1),
            heads, buffer.stride(0), width, GROUP=group, GROUP2=group2, L=config.block, D=config.stride,
            S=config.select_block,
            SPILL=spill, PER2=per2, NS=ns, DK=dim, BK=pad_dim(dim), ROWS=tile.rows, PREC=precision(q.dtype),
            **tile.launch,
        )  # fmt: skip
        choose[(len(chunk) * queries, kv_heads)](
            buffer, out, chunk, kv_heads, buffer.stride(0), width, QUERIES=queries, PART=1, WIDTH=width, SPILL=spill,
            S=config.select_block, COUNT=config.count, INITIAL=config.initial, LOCAL=config.local, num_warps=warps,
        )  # fmt: skip
    return out
