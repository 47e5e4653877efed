"""Tiles of queries and keys whose head dim is not a power of two, in parts.

Triton's tiles have sizes that are powers of two. A key dim of 192 in a tile of 256 columns would load, multiply and
keep in registers a third more than there is; here it is a tile of 128 columns and one of 64. Queries, keys and their
gradients are tuples of tiles: one of BLOCK columns and, unless BLOCK2 is 0, as many of BLOCK2 columns as hold the rest.
Of a tuple of one tile the functions below make what the plain ones make of the tile.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from plumbline.kernels.nsa.triton_backend.common import load_all, load_rows, pad_dim, store_rows

# PLUMBLINE_NSA_PARTS=0 pads such head dims instead, to compare (docs/kernels.md).
IN_PARTS = os.environ.get("PLUMBLINE_NSA_PARTS") != "0"
# Narrowest head dim that is cut: below, the products of a whole tile cost little.
NARROWEST = 64


def widths(dim: int) -> tuple[int, int]:
    """Columns of the two tiles that hold `dim` columns; 0 for the second where one holds them as well."""
    whole = pad_dim(dim)
    first = whole // 2
    if not IN_PARTS or dim <= NARROWEST or dim == whole:
        return whole, 0
    second = pad_dim(dim - first)
    return (first, second) if second < first else (whole, 0)


def narrow_widths(dim: int) -> tuple[int, int]:
    """widths for the pairs' backward: three tiles of 64 columns rather than 128 + 64.

    Its tiles of queries leave no shared memory for the exchange of 128 columns before they are stored.
    """
    return (64, 64) if widths(dim) == (128, 64) else widths(dim)


@triton.constexpr_function
def left(dim, at, block):
    """Of the columns [at, at + block) those that there are."""
    return min(dim - at, block)


@triton.jit
def append(tiles, x):
    return tiles + (x,)  # noqa: RUF005  Triton does not unpack.


@triton.jit
def load_key_tile(
    source, first, c, keys, start, head, stride_t, stride_h,
    ALL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows first + c of one head of keys or values; ALL: none is past the end.

    TMA: source is a descriptor over [rows, heads D]. What it reads past the end or past D belongs to neighbours and
    meets a probability, or a column of the queries, of zero.
    """
    if TMA:
        tile = source.load([start + first, head * D])
    else:
        at = (start + first + c).to(tl.int64) * stride_t + head * stride_h
        if ALL:
            tile = load_all(source, at, D, BLOCK)
        else:
            tile = load_rows(source, at, first + c < keys, D, BLOCK)
    return tile


@triton.jit
def load_keys(
    source, second, first, c, keys, start, head, stride_t, stride_h,
    ALL: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    """load_key_tile in one part or two. TMA: second is a descriptor of the same keys in tiles of BLOCK2 columns."""
    if BLOCK2 == 0:
        tiles = (load_key_tile(source, first, c, keys, start, head, stride_t, stride_h, ALL, TMA, D, BLOCK),)
    elif TMA:
        tiles = (source.load([start + first, head * D]),)
        tiles = append(tiles, second.load([start + first, head * D + BLOCK]))
    else:
        tiles = (load_key_tile(source, first, c, keys, start, head, stride_t, stride_h, ALL, False, BLOCK, BLOCK),)
        rest = load_key_tile(
            source + BLOCK, first, c, keys, start, head, stride_t, stride_h, ALL, False, D - BLOCK, BLOCK2
        )
        tiles = append(tiles, rest)
    return tiles


@triton.jit
def load_query_tile(
    source, first, row, ok, head, group_head, stride_t, stride_h,
    TMA: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[QUERIES GROUP, BLOCK]: all heads of a group for consecutive queries. TMA: a descriptor over [T, Hq, D]."""
    if TMA:
        tile = tl.reshape(source.load([first, group_head, 0]), [QUERIES * GROUP, BLOCK])
    else:
        tile = load_rows(source, row * stride_t + head * stride_h, ok, D, BLOCK)
    return tile


@triton.jit
def load_queries(
    source, second, first, row, ok, head, group_head, stride_t, stride_h,
    TMA: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK2: tl.constexpr,
):  # fmt: skip
    """load_query_tile in one part or two. TMA: second is a descriptor of the same in tiles of BLOCK2 columns."""
    if BLOCK2 == 0:
        tile = load_query_tile(
            source, first, row, ok, head, group_head, stride_t, stride_h, TMA, QUERIES, GROUP, D, BLOCK
        )
        tiles = (tile,)
    elif TMA:
        tiles = (tl.reshape(source.load([first, group_head, 0]), [QUERIES * GROUP, BLOCK]),)
        tiles = append(tiles, tl.reshape(second.load([first, group_head, BLOCK]), [QUERIES * GROUP, BLOCK2]))
    else:
        tiles = load_row_parts(source, row * stride_t + head * stride_h, ok, D, BLOCK, BLOCK2)
    return tiles


@triton.jit
def load_row_parts(ptr, offsets, ok, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr):
    """load_rows in parts."""
    if BLOCK2 == 0:
        tiles = (load_rows(ptr, offsets, ok, D, BLOCK),)
    else:
        tiles = (load_rows(ptr, offsets, ok, BLOCK, BLOCK),)
        for at in tl.static_range(BLOCK, D, BLOCK2):
            tiles = append(tiles, load_rows(ptr + at, offsets, ok, left(D, at, BLOCK2), BLOCK2))
    return tiles


@triton.jit
def store_row_parts(ptr, offsets, ok, tiles, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr):
    """store_rows in parts."""
    if BLOCK2 == 0:
        store_rows(ptr, offsets, ok, tiles[0], D, BLOCK)
    else:
        store_rows(ptr, offsets, ok, tiles[0], BLOCK, BLOCK)
        for at in tl.static_range(BLOCK, D, BLOCK2):
            store_rows(ptr + at, offsets, ok, tiles[1 + (at - BLOCK) // BLOCK2], left(D, at, BLOCK2), BLOCK2)


@triton.jit
def zero_parts(ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK2: tl.constexpr):
    """Accumulators of ROWS rows of D columns."""
    tiles = (tl.zeros([ROWS, BLOCK], tl.float32),)
    if BLOCK2 != 0:
        for _ in tl.static_range(BLOCK, D, BLOCK2):
            tiles = append(tiles, tl.zeros([ROWS, BLOCK2], tl.float32))
    return tiles


@triton.jit
def add_parts(a, b):
    """a + b."""
    tiles = (a[0] + b[0],)
    for i in tl.static_range(1, len(a)):
        tiles = append(tiles, a[i] + b[i])
    return tiles


@triton.jit
def scale_parts(a, factor):
    """a times factor."""
    tiles = (a[0] * factor,)
    for i in tl.static_range(1, len(a)):
        tiles = append(tiles, a[i] * factor)
    return tiles


@triton.jit
def dot_parts(a, b, PREC: tl.constexpr):
    """a b^T over the columns of all parts."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PREC)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PREC)
    return s


@triton.jit
def add_dot_parts(weights, x, acc, PREC: tl.constexpr):
    """acc + weights x, part by part."""
    tiles = (tl.dot(weights, x[0], acc[0], input_precision=PREC),)
    for i in tl.static_range(1, len(x)):
        tiles = append(tiles, tl.dot(weights, x[i], acc[i], input_precision=PREC))
    return tiles
