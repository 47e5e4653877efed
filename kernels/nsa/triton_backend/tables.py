"""Which tile works on which tokens: small int32 tables made once for a Layout and shared by all layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plumbline.kernels.nsa.layout import Layout

# Columns of a tile table: packed row of the sequence's first token, its tokens, the tile's first position within the
# sequence, the position after its last, packed row of the sequence's first compressed block, its compressed blocks.
# The kernels read rows of this many columns.
TILE_COLUMNS = 6


def block_sizes(layout: Layout, block: int, stride: int) -> list[int]:
    """Complete compression blocks of each sequence."""
    return [(n - block) // stride + 1 if n >= block else 0 for n in layout.sizes]


def _table(
    layout: Layout, block: int, stride: int, segments: list[tuple[int, int, int]], step: int, late_first: bool
) -> Tensor:
    """Tiles of `step` positions over segments (sequence, first, end)."""
    blocks = np.array(block_sizes(layout, block, stride), np.int64)
    block_starts = np.cumsum(blocks) - blocks
    sequence, first, end = np.array(segments, np.int64).reshape(-1, 3).T
    counts = np.maximum(-(-(end - first) // step), 0)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.repeat(first, counts) + within * step
    stop = np.minimum(at + step, np.repeat(end, counts))
    s = np.repeat(sequence, counts)
    starts, sizes = np.array(layout.starts, np.int64), np.array(layout.sizes, np.int64)
    table = np.stack([starts[s], sizes[s], at, stop, block_starts[s], blocks[s]], 1)
    # Start the longest tiles first so that short ones fill the gaps at the end.
    order = np.argsort(-at if late_first else at, kind="stable")
    return torch.from_numpy(table[order].astype(np.int32)).to(layout.device)


def query_tiles(
    layout: Layout, queries: int, block: int = 1, stride: int = 1, chunk: int | None = None
) -> list[Tensor]:
    """For each chunk of `chunk` packed tokens (None: one chunk of all), [tiles, TILE_COLUMNS] int32.

    A tile is up to `queries` consecutive tokens of one sequence and one chunk.
    """
    size = chunk or max(layout.tokens, 1)

    def make() -> list[Tensor]:
        segments: list[list[tuple[int, int, int]]] = [[] for _ in range(-(-layout.tokens // size))]
        for b, (start, n) in enumerate(zip(layout.starts, layout.sizes, strict=True)):
            at = 0
            while at < n:
                number = (start + at) // size
                end = min(n, (number + 1) * size - start)
                segments[number].append((b, at, end))
                at = end
        return [_table(layout, block, stride, part, queries, True) for part in segments]

    return layout.memo(("query", queries, block, stride, size), make)


def key_tiles(layout: Layout, keys: int, block: int, stride: int) -> Tensor:
    """Tiles of `keys` compressed blocks."""
    segments = [(b, 0, n) for b, n in enumerate(block_sizes(layout, block, stride))]
    return layout.memo(("key", keys, block, stride), lambda: _table(layout, block, stride, segments, keys, False))


def token_tiles(layout: Layout, tokens: int, first: int = 0, last: int | None = None) -> Tensor:
    """Tiles of `tokens` raw tokens of [first, last) of each sequence, as keys."""
    segments = [(b, first, n if last is None else min(n, last)) for b, n in enumerate(layout.sizes)]
    return layout.memo(("token", tokens, first, last), lambda: _table(layout, 1, 1, segments, tokens, False))


def initial_tiles(layout: Layout, tokens: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of the tokens [0, last) of each sequence, the column of compressed rows holding `last` times the sequence's
    number; packed rows of those tokens, and their rows when each sequence takes `last` rows (both int64)."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        sizes = [min(n, last) for n in layout.sizes]
        table = _table(layout, 1, 1, [(b, 0, n) for b, n in enumerate(sizes)], tokens, False)
        number = {start: b for b, (start, n) in enumerate(zip(layout.starts, sizes, strict=True)) if n}
        table[:, 4] = torch.tensor([number[start] * last for start in table[:, 0].tolist()], dtype=torch.int32)
        rows = [start + i for start, n in zip(layout.starts, sizes, strict=True) for i in range(n)]
        compact = [b * last + i for b, n in enumerate(sizes) for i in range(n)]
        return table, torch.tensor(rows, device=layout.device), torch.tensor(compact, device=layout.device)

    return layout.memo(("initial", tokens, last), make)


def token_table(layout: Layout, select_block: int) -> tuple[Tensor, int]:
    """([T, 3] int32: packed row of each token's sequence, tokens of it, and the number of its first selection block,
    the blocks of all sequences being numbered in one row; count of all selection blocks)."""

    def make() -> tuple[Tensor, int]:
        sizes = np.array(layout.sizes, np.int64)
        blocks = -(-sizes // select_block)
        columns = np.stack([np.array(layout.starts, np.int64), sizes, np.cumsum(blocks) - blocks], 1)
        return torch.from_numpy(np.repeat(columns, sizes, 0).astype(np.int32)).to(layout.device), int(blocks.sum())

    return layout.memo(("token_table", select_block), make)


def selection_table(layout: Layout, select_block: int) -> Tensor:
    """[selection blocks, 3] int32: packed row of the sequence, its tokens, position of the block's first token."""

    def make() -> Tensor:
        segments = [(b, 0, n) for b, n in enumerate(layout.sizes)]
        # Stable order by sequence is needed here, so that numbers match token_table.
        rows = [(layout.starts[b], n, first) for b, _, n in segments for first in range(0, n, select_block)]
        return torch.from_numpy(np.array(rows, np.int32).reshape(-1, 3)).to(layout.device)

    return layout.memo(("selection_table", select_block), make)
