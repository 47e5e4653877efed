"""The pairs (query, block) of pairs.py, sorted by block and cut into work items. Nothing here asks the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from plumbline.kernels.nsa.layout import Layout
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
        # Every block has at most one item that is not full.
        bound = min(blocks, self.pairs_per_chunk) + self.pairs_per_chunk // size

        def ints(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.int32, device=starts.device)

        # Rows stay aligned to 16 bytes, so that one compiled kernel serves all chunks.
        width = blocks + 1 + -(blocks + 1) % 4
        ends, extra, items = ints(chunks, width), ints(chunks, width), ints(chunks, bound, 4)
        count_items[(chunks,)](starts, ends, extra, starts.stride(0), blocks, width, size, STEP=1024, num_warps=4)
        cut_items[(chunks, -(-bound // 256))](
            starts, ends, extra, items, starts.stride(0), blocks, width, size, bound, STEP=256, num_warps=4
        )
        return Items(items, extra, max(1, self.pairs_per_chunk // size))


def list_pairs(indices: Tensor, layout: Layout, select_block: int, chunk: int, skip: tuple[int, int]) -> PairList:
    """indices [T, Hkv, count] int32 contiguous -> the pairs of chunks of `chunk` queries.

    skip: how many of the first blocks and of the newest ones to leave out.
    """
    tokens, kv_heads, count = indices.shape
    table, blocks = token_table(layout, select_block)
    chunks = -(-tokens // chunk)
    per_chunk = kv_heads * blocks
    keys = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    if tokens:
        pair_keys[(-(-indices.numel() // 1024),)](
            indices, table, keys, indices.numel(), chunk, blocks, chunks * per_chunk,
            KV_HEADS=kv_heads, COUNT=count, S=select_block, INITIAL=skip[0], LOCAL=skip[1], STEP=1024, num_warps=4,
        )  # fmt: skip
    ordered, pairs = torch.sort(keys, stable=True)
    numbers = torch.arange(chunks * per_chunk + 1, device=keys.device, dtype=torch.int32)
    edges = torch.searchsorted(ordered, numbers, out_int32=True)
    # A chunk's last edge is the next one's first.
    starts = edges.as_strided((chunks, per_chunk + 1), (per_chunk, 1))
    places = torch.remainder(pairs, chunk * kv_heads * count, out=torch.empty_like(keys))
    return PairList(chunk, places, starts, min(chunk, tokens) * kv_heads * count)


@triton.jit(do_not_specialize=["total", "chunk", "blocks", "nothing"])
def pair_keys(
    indices_ptr, table_ptr, keys_ptr, total, chunk, blocks, nothing,
    KV_HEADS: tl.constexpr, COUNT: tl.constexpr, S: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """What the pairs are sorted by: (chunk Hkv + head) blocks + block; `nothing` for slots that name no block."""
    e = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    there = e < total
    j = tl.load(indices_ptr + e, mask=there, other=-1)
    t = (e // (KV_HEADS * COUNT)).to(tl.int32)
    head = (e // COUNT % KV_HEADS).to(tl.int32)
    start = tl.load(table_ptr + t.to(tl.int64) * 3, mask=there, other=0)
    first = tl.load(table_ptr + t.to(tl.int64) * 3 + 2, mask=there, other=0)
    own = (t - start) // S
    ok = (j >= INITIAL) & (j <= own - LOCAL)
    tl.store(keys_ptr + e, tl.where(ok, (t // chunk * KV_HEADS + head) * blocks + first + j, nothing), mask=there)


@triton.jit(do_not_specialize=["starts_c", "blocks", "width", "size"])
def count_items(starts_ptr, ends_ptr, extra_ptr, starts_c, blocks, width, size, STEP: tl.constexpr):
    """Of one chunk, before each block and after the last: items (ends [chunks, width], the block's own included) and
    extra items (extra [chunks, width], without the block's own)."""
    starts = starts_ptr + tl.program_id(0) * starts_c
    to = tl.program_id(0) * width
    items = tl.full([], 0, tl.int32)
    extras = tl.full([], 0, tl.int32)
    for first in range(0, width, STEP):
        b = first + tl.arange(0, STEP)
        real = b < blocks
        pairs = tl.load(starts + b + 1, mask=real, other=0) - tl.load(starts + b, mask=real, other=0)
        pieces = (pairs + size - 1) // size
        more = tl.maximum(pieces - 1, 0)
        tl.store(ends_ptr + to + b, items + tl.cumsum(pieces, 0), mask=b < width)
        tl.store(extra_ptr + to + b, extras + tl.cumsum(more, 0) - more, mask=b < width)
        items += tl.sum(pieces, 0)
        extras += tl.sum(more, 0)


@triton.jit(do_not_specialize=["starts_c", "blocks", "width", "size", "bound"])
def cut_items(
    starts_ptr, ends_ptr, extra_ptr, items_ptr, starts_c, blocks, width, size, bound, STEP: tl.constexpr
):  # fmt: skip
    """items [chunks, bound, 4], see Items."""
    starts = starts_ptr + tl.program_id(0) * starts_c
    ends, extra = ends_ptr + tl.program_id(0) * width, extra_ptr + tl.program_id(0) * width
    item = tl.program_id(1) * STEP + tl.arange(0, STEP)
    # The block of an item is the first whose end lies beyond it.
    low = tl.zeros([STEP], tl.int32)
    high = tl.full([STEP], 0, tl.int32) + blocks
    left = blocks
    while left > 0:
        middle = (low + high) // 2
        beyond = tl.load(ends + middle, mask=middle < blocks, other=2147483647) > item
        high = tl.where(beyond & (low < high), middle, high)
        low = tl.where(beyond | (low >= high), low, middle + 1)
        left = left // 2
    block = low
    real = block < blocks
    first = tl.load(starts + block, mask=real, other=0)
    last = tl.load(starts + block + 1, mask=real, other=0)
    end = tl.load(ends + block, mask=real, other=0)
    within = item - (end - (last - first + size - 1) // size)
    first += within * size
    place = tl.load(extra + block, mask=real, other=0) + within - 1
    to = items_ptr + (tl.program_id(0) * bound + item).to(tl.int64) * 4
    there = item < bound
    tl.store(to, block, mask=there)
    tl.store(to + 1, first, mask=there)
    tl.store(to + 2, tl.minimum(first + size, last), mask=there)
    tl.store(to + 3, tl.where(within > 0, place, -1), mask=there)
