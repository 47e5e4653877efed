"""Host side of the kernels: tile sizes, launches, and the order in which gradients are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plumbline.kernels.nsa.config import NSAConfig
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend import dense, pairs, tables
from plumbline.kernels.nsa.triton_backend.common import (
    LOG2E,
    Tiles,
    exact,
    fit_rows,
    key_descriptor,
    pad_dim,
    precision,
    query_descriptor,
)
from plumbline.kernels.nsa.triton_backend.dense import CMP, FORCED, INITIAL, WIN
from plumbline.kernels.nsa.triton_backend.listing import Items, PairList, list_pairs
from plumbline.kernels.nsa.triton_backend.parts import narrow_widths, widths

# Bytes of partial outputs (forward) or partial query gradients (backward) of the selected branch held at once.
PAIR_BYTES = 2**31
# Queries of a chunk at most: with more, the queries that one head's pairs gather no longer fit the L2 cache.
PAIR_CHUNK = 8192
# Programs that the gradients of compressed keys are cut into, where the sequences are long enough.
BACKWARD_PROGRAMS = 2048
# A window in which any sequence fits. Not the longest one's length: kernels are compiled for each value.
EVERYTHING = 1 << 30


@dataclass(frozen=True)
class Range:
    """What the queries of a dense branch see (dense.py): kind, its two numbers, tokens of the initial blocks."""

    kind: int
    a: int
    b: int = 1
    initial: int = 0

    @classmethod
    def compressed(cls, block: int, stride: int) -> Range:
        return cls(CMP, block, stride)

    @classmethod
    def window(cls, window: int) -> Range:
        return cls(WIN, window)

    @classmethod
    def forced(cls, config: NSAConfig) -> Range:
        return cls(FORCED, config.select_block, config.local, config.initial * config.select_block)

    @classmethod
    def everything(cls) -> Range:
        """All tokens so far."""
        return cls(WIN, EVERYTHING)

    @property
    def blocks(self) -> tuple[int, int]:
        """(l, d) for the tile tables."""
        return (self.a, self.b) if self.kind == CMP else (1, 1)


def two_parts(dk: int, dv: int) -> bool:
    """Whether keys are a tile of 128 columns and a narrower one, and values fit 128 columns."""
    first, second = widths(dk)
    return first == 128 and second > 0 and pad_dim(dv) <= 128


def forward_tiles(x: Tensor, dv: int, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(32, group), 32, 4, 1)
    if two_parts(x.shape[-1], dv):
        # Few keys, so that two tiles fit a multiprocessor here too.
        return Tiles(fit_rows(128, group), 32, 8, 3, tma=True, registers=128)
    if pad_dim(x.shape[-1]) > 128:
        return Tiles(fit_rows(128, group), 64, 8, 2, tma=True)
    if pad_dim(x.shape[-1]) <= 64:
        return Tiles(fit_rows(64, group), 64, 4, 3, tma=True)
    # Two tiles a multiprocessor: one's softmax hides behind the other's products.
    return Tiles(fit_rows(128, group), 64, 8, 2, tma=True, registers=128)


def query_tiles(x: Tensor, dv: int, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(32, group), 32, 4, 1)
    if pad_dim(x.shape[-1]) > 128 and not two_parts(x.shape[-1], dv):
        return Tiles(fit_rows(64, group), 32, 4, 2, tma=True)
    return Tiles(fit_rows(64, group), 64 if pad_dim(x.shape[-1]) <= 64 else 32, 4, 3, tma=True)


def key_tiles(x: Tensor, dv: int, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(16, group), 32, 4, 1)
    if two_parts(x.shape[-1], dv) and group <= 64:
        # 128 keys, since 8 warps would do products of 64 rows twice; of queries as many as leave the loops unspilled.
        return Tiles(fit_rows(32, group), 128, 8, 3, tma=True)
    if pad_dim(x.shape[-1]) > 128:
        return Tiles(fit_rows(32, group), 64, 8, 2, tma=True)
    if pad_dim(x.shape[-1]) <= 64:
        return Tiles(fit_rows(64, group), 64, 4, 3, tma=True)
    return Tiles(fit_rows(64, group), 128, 8, 3, tma=True)


def pair_tiles(x: Tensor, dv: int, group: int, select_block: int, backward: bool) -> Tiles:
    keys = max(16, triton.next_power_of_2(select_block))
    if exact(x.dtype):
        return Tiles(fit_rows(16, group), keys, 4, 1)
    wide = two_parts(x.shape[-1], dv)
    if keys > 64 or (pad_dim(x.shape[-1]) > 128 and not wide):
        return Tiles(fit_rows(32 if backward else 64, group), keys, 8, 2)
    small = pad_dim(x.shape[-1]) <= 64
    if backward:
        return Tiles(fit_rows(128, group), keys, 4 if small else 8, 2)
    return Tiles(fit_rows(64, group), keys, 4, 1, registers=None if small or wide else 128)


# What a kernel reads keys and values from: keys, the second part of wide keys (parts.py), values.
Sources = tuple[Tensor | TensorDescriptor, TensorDescriptor | None, Tensor | TensorDescriptor]


def key_sources(kvs: Sequence[tuple[Tensor, Tensor]], size: Tiles) -> tuple[list[Sources], bool]:
    """Sources of these keys and values, and whether they are descriptors: those of all or of none."""
    plain: list[Sources] = [(k, None, v) for k, v in kvs]
    if not size.tma:
        return plain, False
    made: list[Sources] = []
    for k, v in kvs:
        bk, bk2 = widths(k.shape[2])
        first, values = key_descriptor(k, size.keys, bk), key_descriptor(v, size.keys, pad_dim(v.shape[2]))
        if first is None or values is None:
            return plain, False
        made.append((first, key_descriptor(k, size.keys, bk2) if bk2 else None, values))
    return made, True


def dense_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Range, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, Dv], lse [T, Hq] float32 in log 2)."""
    tokens, heads, dk = q.shape
    group, dv = heads // k.shape[1], v.shape[2]
    size = forward_tiles(q, dv, group)
    tiles = tables.query_tiles(layout, size.rows // group, *reach.blocks)[0]
    out = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    (sources,), tma = key_sources([(k, v)], size)
    bk, bk2 = widths(dk)
    dense.forward[(len(tiles), k.shape[1])](
        q, *sources, out, lse, tiles, scale * LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), heads,
        GROUP=group, KIND=reach.kind, A=reach.a, B=reach.b, INIT=reach.initial, DK=dk, DV=dv, BK=bk, BK2=bk2,
        BV=pad_dim(dv), ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), TMA=tma, **size.launch,
    )  # fmt: skip
    return out, lse


def dense_keys_backward(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, shift: Tensor, dot: Tensor, layout: Layout, reach: Range, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients (dk, dv) in float32. Of FORCED too, initial blocks included."""
    heads = q.shape[1]
    group = heads // k.shape[1]
    size = key_tiles(q, v.shape[2], group)
    bk, bk2 = widths(k.shape[2])

    def launch(kind: int, tiles: Tensor, splits: int, keys: int) -> tuple[Tensor, Tensor]:
        dk, dv = (
            torch.empty(splits, keys, x.shape[1], x.shape[2], dtype=torch.float32, device=q.device) for x in (k, v)
        )
        if len(tiles):
            queries, dv_columns = size.rows // group, pad_dim(v.shape[2])
            made = (
                [query_descriptor(x, queries, group, n) for x, n in ((q, bk), (do, dv_columns))] if size.tma else [None]
            )
            tma = None not in made
            second = query_descriptor(q, queries, group, bk2) if tma and bk2 else None
            first_q, of_do = made if tma else (q, do)
            dense.backward_keys[(len(tiles), k.shape[1], splits)](
                first_q, second, of_do, k, v, dk, dv, shift, dot, tiles, scale, scale * LOG2E, q.stride(0),
                q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, keys, splits,
                GROUP=group, KIND=kind, A=reach.a, B=reach.b, INIT=reach.initial, DK=k.shape[2], DV=v.shape[2],
                BK=bk, BK2=bk2, BV=dv_columns, ROWS=size.rows, KEYS=size.keys, SPLIT=splits > 1,
                PREC=precision(q.dtype), TMA=tma, **size.launch,
            )  # fmt: skip
        return dk, dv

    if reach.kind == CMP:
        tiles = tables.key_tiles(layout, size.keys, reach.a, reach.b)
        # Early keys are seen by all later queries; parts of the queries keep the first tiles from outlasting the
        # others, and the card busy where there are few tiles.
        splits = max(1, min(layout.longest // 2048, BACKWARD_PROGRAMS // max(1, len(tiles) * k.shape[1])))
        dk, dv = launch(CMP, tiles, splits, k.shape[0])
        return dk.sum(0) if splits > 1 else dk[0], dv.sum(0) if splits > 1 else dv[0]
    if reach.kind == WIN:
        dk, dv = launch(WIN, tables.token_tiles(layout, size.keys), 1, k.shape[0])
        return dk[0], dv[0]
    (dk,), (dv,) = launch(FORCED, tables.token_tiles(layout, size.keys, reach.initial), 1, k.shape[0])
    if reach.initial:
        splits = max(1, min(64, layout.longest // 1024))
        tiles, rows, compact = tables.initial_tiles(layout, size.keys, reach.initial)
        part_k, part_v = launch(INITIAL, tiles, splits, reach.initial * len(layout.sizes))
        dk[rows], dv[rows] = part_k.sum(0)[compact], part_v.sum(0)[compact]
    return dk, dv


def forced_blocks(config: NSAConfig | None) -> tuple[int, int]:
    return (config.initial, config.local) if config else (0, 0)


@dataclass(frozen=True)
class Selection:
    """How the selected branch is worked out.

    Attributes:
        indices: [T, Hkv, count] int32; None: every block is chosen, so that the branch is causal attention.
        select_block: l'.
        forced: config whose forced blocks are known to be chosen (they are then worked out densely), None otherwise.
    """

    indices: Tensor | None
    select_block: int
    forced: NSAConfig | None

    @property
    def mode(self) -> int:
        """SLC of the kernels."""
        return 3 if self.indices is None else 1 if self.forced else 2

    def listed(self, layout: Layout, bytes_per_pair: int) -> PairList | None:
        """The pairs left to pairs.py, in chunks whose parts fit PAIR_BYTES; None where every block is chosen."""
        if self.indices is None:
            return None
        per_token = bytes_per_pair * self.indices.shape[1] * self.indices.shape[2]
        chunk = max(1, min(layout.tokens, PAIR_CHUNK, max(64, PAIR_BYTES // per_token)))
        return list_pairs(self.indices, layout, self.select_block, chunk, forced_blocks(self.forced))


@dataclass(frozen=True)
class Branch:
    """Keys and values of a branch, and what its backward reads: shift, dot [T, Hq] float32 (mix.gate_gradients).

    gate [T, Hq] scales the branch (None: 1); d_lse [T, Hq] is the gradient of its lse that is already part of dot.
    """

    k: Tensor
    v: Tensor
    shift: Tensor
    dot: Tensor
    gate: Tensor | None = None
    d_lse: Tensor | None = None

    def settled(self, total: Tensor) -> Branch:
        """The same with dot corrected, where total [T, Hq] is what a query's logit gradients add up to as it is.

        They must add up to d_lse, or to zero. With dot made from an output that was rounded they miss that, each by the
        same share of its probability, and what phi's weight meets has much in common between blocks: there it adds up.
        """
        missed = total if self.d_lse is None else total - self.d_lse
        if self.gate is not None:
            missed = torch.where(self.gate > 0, missed / self.gate, 0.0)
        return replace(self, dot=self.dot + missed)

    def arguments(self, sources: Sources) -> list[object]:
        """Of the kernel, keys and values by these sources."""
        k, v = self.k, self.v
        return [*sources, self.shift, self.dot, k.stride(0), k.stride(1), v.stride(0), v.stride(1)]


def backward(
    q: Tensor,
    do: Tensor,
    layout: Layout,
    scale: float,
    cmp: tuple[Branch, Range] | None,
    slc: tuple[Branch, Selection] | None,
    win: tuple[Branch, Range] | None,
    listed: PairList | None = None,
    dq_type: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Gradient of q [T, Hq, Dk], and of keys and values (float32) by branch name.

    listed: the selection's pairs. dq_type: of the gradient of q (None: q's).
    """
    tokens, heads, dk = q.shape
    some = next(branch[0] for branch in (cmp, slc, win) if branch)
    kv_heads, dv = some.k.shape[1], some.v.shape[2]
    group = heads // kv_heads
    grads: dict[str, tuple[Tensor, Tensor]] = {}

    def keys_of(branch: Branch, reach: Range) -> tuple[Tensor, Tensor]:
        return dense_keys_backward(q, do, branch.k, branch.v, branch.shift, branch.dot, layout, reach, scale)

    if win:
        grads["win"] = keys_of(*win)
    selection = slc[1] if slc else Selection(None, 1, None)
    mode = selection.mode if slc else 0
    if slc:
        grads["slc"] = _selected_keys_start(q, do, slc[0], layout, selection, scale)
    count = selection.indices.shape[2] if selection.indices is not None else 1
    chunk = listed.chunk if listed else max(tokens, 1)
    part = torch.empty(chunk if listed else 0, kv_heads, count, group, dk, dtype=q.dtype, device=q.device)
    dq = torch.empty(tokens, heads, dk, dtype=dq_type or q.dtype, device=q.device)
    total = torch.empty(tokens if cmp else 0, heads, dtype=torch.float32, device=q.device)
    size = query_tiles(q, dv, group)
    bk, bk2 = widths(dk)
    reach_c = cmp[1] if cmp else Range(CMP, 1)
    tiles = tables.query_tiles(layout, size.rows // group, *reach_c.blocks, chunk)
    initial, local = forced_blocks(selection.forced)
    s = selection.select_block
    items = listed.items(16 * max(8, pair_tiles(q, dv, group, s, True).rows // group)) if listed else None
    branches = [(branch or (some,))[0] for branch in (cmp, slc, win)]
    sources, tma = key_sources([(branch.k, branch.v) for branch in branches], size)
    arguments = [x for branch, of in zip(branches, sources, strict=True) for x in branch.arguments(of)]
    for number, first in enumerate(range(0, tokens, chunk)):
        if slc and listed and items:
            _pairs_backward(q, do, slc[0], layout, s, listed, items, number, first, count, part, grads["slc"], scale)
        dense.backward_queries[(len(tiles[number]), kv_heads)](
            q, do, dq, tiles[number], scale, scale * LOG2E, q.stride(0), q.stride(1), heads, *arguments, part,
            selection.indices if listed else tiles[number], first, total, GROUP=group, HAS_CMP=cmp is not None,
            SLC=mode, HAS_WIN=win is not None, COUNT=count, SKIP=mode == 1, L=reach_c.a, D=reach_c.b,
            S=selection.select_block, LOCAL=local,
            INITIAL_BLOCKS=initial, W=win[1].a if win else 1, WHOLE=EVERYTHING, DK=dk, DV=dv,
            BK=bk, BK2=bk2, BV=pad_dim(dv),
            ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), TMA=tma, **size.launch,
        )  # fmt: skip
    del part  # Room for the parts of the compressed keys' gradients.
    if cmp:
        grads["cmp"] = keys_of(cmp[0].settled(total), cmp[1])
    return dq, grads


def _selected_keys_start(
    q: Tensor, do: Tensor, branch: Branch, layout: Layout, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected branch's keys and values without the pairs'."""
    if selection.mode == 2:
        k, v = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (branch.k, branch.v))
        return k, v
    reach = Range.forced(selection.forced) if selection.forced else Range.everything()
    return dense_keys_backward(q, do, branch.k, branch.v, branch.shift, branch.dot, layout, reach, scale)


def _pairs_backward(
    q: Tensor, do: Tensor, branch: Branch, layout: Layout, s: int, listed: PairList, work: Items,
    number: int, first: int, count: int, part: Tensor, totals: tuple[Tensor, Tensor], scale: float,
) -> None:  # fmt: skip
    """Fills part with the query gradients of a chunk's pairs and adds their key and value gradients to totals."""
    k, v = branch.k, branch.v
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    size = pair_tiles(q, v.shape[2], group, s, True)
    bk, bk2 = narrow_widths(k.shape[2])
    items, first_extra = work.items[number], work.first_extra[number]
    extra_k, extra_v = (torch.empty(work.extra, s, x.shape[2], dtype=torch.float32, device=q.device) for x in (k, v))
    blocks = tables.selection_table(layout, s)
    pairs.backward_pairs[(len(items),)](
        q, do, k, v, branch.shift, branch.dot, part, *totals, extra_k, extra_v, items, listed.pairs, blocks, scale,
        scale * LOG2E, first, len(blocks),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), KV_HEADS=kv_heads, COUNT=count,
        GROUP=group, S=s, DK=k.shape[2], DV=v.shape[2], BK=bk, BK2=bk2, BV=pad_dim(v.shape[2]),
        ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), **size.launch,
    )  # fmt: skip
    for x, total in ((extra_k, totals[0]), (extra_v, totals[1])):
        pairs.add_extra[(len(blocks) * kv_heads,)](
            x, total, first_extra, blocks, len(blocks), KV_HEADS=kv_heads, S=s, DIM=x.shape[2],
            BD=pad_dim(x.shape[2]), KEYS=size.keys, num_warps=8,
        )  # fmt: skip
