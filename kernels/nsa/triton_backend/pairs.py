"""Selected attention turned round: for each selection block, the queries that chose it.

A (query, kv head, slot) that names a block is a pair. Sorting pairs by block gives every block a list of queries, so
that a tile of many queries times the group's heads meets one block of keys: no group is padded, and each block is read
once an item rather than once a query. What a pair contributes is written to its own place and summed in slot order
later, so nothing needs atomics and every run gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend.common import load_rows, store_rows
from plumbline.kernels.nsa.triton_backend.tables import token_table


@dataclass(frozen=True)
class Items:
    """Work items of every chunk.

    Their count is a bound known without asking the device; items past a chunk's last one name no block. The first item
    of a block may add to the block's total; the others, the extra ones, are numbered through a chunk's blocks.

    Attributes:
        items: [chunks, items, 4] int32: block (Hkv blocks for none), first and last pair, extra number (-1: a first
            item).
        first_extra: [chunks, Hkv blocks + 1 or more] int32: first extra number of each block.
        extra: a bound on the extra items of a chunk.
    """

    items: Tensor
    first_extra: Tensor
    extra: int


@dataclass(frozen=True)
class PairList:
    """Pairs sorted by (chunk of queries, kv head, block), in query order within a block.

    Attributes:
        chunk: queries of a chunk.
        pairs: [T Hkv count] int32, a pair's number (t Hkv + h) count + slot, t counted within its chunk.
        starts: [chunks, Hkv blocks + 1] int32, first pair of each block.
        pairs_per_chunk: at most.
    """

    chunk: int
    pairs: Tensor
    starts: Tensor
    pairs_per_chunk: int

    def items(self, size: int) -> Items:
        """The pairs cut into items of at most `size` pairs of one block."""
        starts = self.starts
        chunks, blocks = starts.shape[0], starts.shape[1] - 1
        pieces = (starts[:, 1:] - starts[:, :-1] + size - 1) // size
        ends = pieces.cumsum(1, dtype=torch.int32)
        # Every block has at most one item that is not full.
        bound = min(blocks, self.pairs_per_chunk) + self.pairs_per_chunk // size
        item = torch.arange(bound, device=starts.device, dtype=torch.int32).expand(chunks, -1).contiguous()
        block = torch.searchsorted(ends, item, right=True, out_int32=True)
        inside = block.clamp(max=blocks - 1).long()
        within = item - (ends - pieces).gather(1, inside)
        first = starts.gather(1, inside) + within * size
        last = torch.minimum(first + size, starts.gather(1, inside + 1))
        # Rows stay aligned to 16 bytes, so that one compiled kernel serves all chunks.
        extra = torch.nn.functional.pad((pieces - 1).clamp(min=0).cumsum(1, dtype=torch.int32), (1, -(blocks + 1) % 4))
        place = torch.where(within > 0, extra.gather(1, inside) + within - 1, -1)
        items = torch.stack([block, first, last, place], 2).int()
        return Items(items, extra, max(1, self.pairs_per_chunk // size))


def list_pairs(indices: Tensor, layout: Layout, select_block: int, chunk: int, skip: tuple[int, int]) -> PairList:
    """indices [T, Hkv, count] int32 -> the pairs of chunks of `chunk` queries."""
    tokens, kv_heads, count = indices.shape
    table, blocks = token_table(layout, select_block)
    chunks = -(-tokens // chunk)
    t = torch.arange(tokens, device=indices.device, dtype=torch.int32)
    own = (t - table[:, 0]) // select_block
    ok = (indices >= 0) & (indices <= own[:, None, None])
    if skip != (0, 0):
        ok &= (indices >= skip[0]) & (indices <= (own - skip[1])[:, None, None])
    head = torch.arange(kv_heads, device=indices.device, dtype=torch.int32)
    group = (t // chunk)[:, None] * kv_heads + head
    key = group[..., None] * blocks + table[:, 2, None, None] + indices
    nothing = chunks * kv_heads * blocks
    key = torch.where(ok, key, torch.full_like(key, nothing)).flatten()
    ordered, pairs = torch.sort(key, stable=True)
    edges = torch.searchsorted(ordered, torch.arange(nothing + 1, device=key.device, dtype=torch.int32), out_int32=True)
    per_chunk = kv_heads * blocks
    first = torch.arange(chunks, device=key.device)[:, None] * per_chunk
    starts = edges[first + torch.arange(per_chunk + 1, device=key.device)]
    return PairList(chunk, (pairs % (chunk * kv_heads * count)).int(), starts, min(chunk, tokens) * kv_heads * count)


@triton.jit
def forward_pairs(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, items_ptr, pairs_ptr, blocks_ptr, scale, chunk_first, blocks,
    q_t, q_h, k_t, k_h, v_t, v_h,
    KV_HEADS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
        k = load_rows(k_ptr, at * k_t + kv_head * k_h, key_ok, DK, BK)
        v = load_rows(v_ptr, at * v_t + kv_head * v_h, key_ok, DV, BV)
        r = tl.arange(0, ROWS)
        g = r % GROUP
        for i in range(first, last, PAIRS):
            ok = (r // GROUP < PAIRS) & (i + r // GROUP < last)
            pair = tl.load(pairs_ptr + i + r // GROUP, mask=ok, other=0)
            row = (chunk_first + pair // (COUNT * KV_HEADS)).to(tl.int64)
            t = (row - start).to(tl.int32)
            q = load_rows(q_ptr, row * q_t + (kv_head * GROUP + g) * q_h, ok, DK, BK)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
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


@triton.jit
def backward_pairs(
    q_ptr, do_ptr, k_ptr, v_ptr, shift_ptr, dot_ptr, dq_ptr, dk_ptr, dv_ptr, extra_k_ptr, extra_v_ptr, items_ptr,
    pairs_ptr, blocks_ptr, natural_scale, scale, chunk_first, blocks, q_t, q_h, k_t, k_h, v_t, v_h,
    KV_HEADS: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
        k = load_rows(k_ptr, at * k_t + kv_head * k_h, key_ok, DK, BK)
        v = load_rows(v_ptr, at * v_t + kv_head * v_h, key_ok, DV, BV)
        dk = tl.zeros([KEYS, BK], tl.float32)
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
            q = load_rows(q_ptr, row * q_t + head * q_h, ok, DK, BK)
            do = load_rows(do_ptr, flat * DV, ok, DV, BV)
            shift = tl.load(shift_ptr + flat, mask=ok, other=float("inf"))
            dot = tl.load(dot_ptr + flat, mask=ok, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            p = tl.exp2(s * scale - shift[:, None])
            p = tl.where(key_ok[None, :] & (column[None, :] <= t[:, None]), p, 0.0)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PREC)
            dp = tl.dot(do, tl.trans(v), input_precision=PREC)
            ds = (p * (dp - dot[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PREC)
            dq = tl.dot(ds, k, input_precision=PREC)
            store_rows(dq_ptr, (pair.to(tl.int64) * GROUP + g) * DK, ok, dq, DK, BK)
        dk *= natural_scale
        if place < 0:
            to = at * KV_HEADS + kv_head
            store_rows(dk_ptr, to * DK, key_ok, load_rows(dk_ptr, to * DK, key_ok, DK, BK) + dk, DK, BK)
            store_rows(dv_ptr, to * DV, key_ok, load_rows(dv_ptr, to * DV, key_ok, DV, BV) + dv, DV, BV)
        else:
            to = place.to(tl.int64) * S + c
            store_rows(extra_k_ptr, to * DK, c < S, dk, DK, BK)
            store_rows(extra_v_ptr, to * DV, c < S, dv, DV, BV)


@triton.jit
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
