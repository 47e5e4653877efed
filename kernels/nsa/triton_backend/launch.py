"""Host side of the kernels: tile sizes, launches, and the order in which gradients are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plumbline.kernels.nsa.config import NSAConfig
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend import dense, mix, pairs, tables
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

# Bytes of partial outputs (forward) and partial query gradients (backward) of the selected branch held at once.
PAIR_BYTES_FORWARD = 2**30
PAIR_BYTES_BACKWARD = 2**31


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

    @property
    def blocks(self) -> tuple[int, int]:
        """(l, d) for the tile tables."""
        return (self.a, self.b) if self.kind == CMP else (1, 1)


def forward_tiles(x: Tensor, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(32, group), 32, 4, 1)
    if pad_dim(x.shape[-1]) > 128:
        return Tiles(fit_rows(128, group), 64, 8, 2, tma=True)
    # Two tiles a multiprocessor: one's softmax hides behind the other's products.
    return Tiles(fit_rows(128, group), 64, 8, 2, tma=True, registers=128)


def query_tiles(x: Tensor, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(32, group), 32, 4, 1)
    return Tiles(fit_rows(64, group), 32 if pad_dim(x.shape[-1]) > 128 else 64, 4, 2, tma=True)


def key_tiles(x: Tensor, group: int) -> Tiles:
    if exact(x.dtype):
        return Tiles(fit_rows(16, group), 32, 4, 1)
    if pad_dim(x.shape[-1]) > 128:
        return Tiles(fit_rows(32, group), 64, 8, 2, tma=True)
    return Tiles(fit_rows(64, group), 128, 8, 3, tma=True)


def pair_tiles(x: Tensor, group: int, select_block: int, backward: bool) -> Tiles:
    keys = max(16, triton.next_power_of_2(select_block))
    if exact(x.dtype):
        return Tiles(fit_rows(16, group), keys, 4, 1)
    if pad_dim(x.shape[-1]) > 128 or keys > 64:
        return Tiles(fit_rows(32 if backward else 64, group), keys, 8, 2)
    return Tiles(fit_rows(128, group), keys, 8, 2) if backward else Tiles(fit_rows(64, group), keys, 4, 1)


def key_sources(xs: Sequence[Tensor], size: Tiles) -> list[TensorDescriptor] | None:
    """Descriptors of these keys and values, None where plain pointers must do."""
    made = [key_descriptor(x, size.keys) for x in xs] if size.tma else [None]
    found = [x for x in made if x is not None]
    return found if len(found) == len(xs) else None


def dense_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, reach: Range, scale: float) -> tuple[Tensor, Tensor]:
    """(out [T, Hq, Dv], lse [T, Hq] float32 in log 2)."""
    tokens, heads, dk = q.shape
    group, dv = heads // k.shape[1], v.shape[2]
    size = forward_tiles(q, group)
    tiles = tables.query_tiles(layout, size.rows // group, *reach.blocks)[0]
    out = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    sources = key_sources((k, v), size)
    tma = sources is not None
    dense.forward[(len(tiles), k.shape[1])](
        q, *(sources or (k, v)), out, lse, tiles, scale * LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), heads,
        GROUP=group, KIND=reach.kind, A=reach.a, B=reach.b, INIT=reach.initial, DK=dk, DV=dv, BK=pad_dim(dk),
        BV=pad_dim(dv),
        ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), TMA=tma, **size.launch,
    )  # fmt: skip
    return out, lse


def dense_keys_backward(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, shift: Tensor, dot: Tensor, layout: Layout, reach: Range, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients (dk, dv) in float32. Of FORCED too, initial blocks included."""
    heads = q.shape[1]
    group = heads // k.shape[1]
    size = key_tiles(q, group)

    def launch(kind: int, tiles: Tensor, splits: int, keys: int) -> tuple[Tensor, Tensor]:
        dk, dv = (
            torch.empty(splits, keys, x.shape[1], x.shape[2], dtype=torch.float32, device=q.device) for x in (k, v)
        )
        if len(tiles):
            queries = size.rows // group
            made = [query_descriptor(x, queries, group) for x in (q, do)] if size.tma else [None]
            tma = None not in made
            dense.backward_keys[(len(tiles), k.shape[1], splits)](
                *(made if tma else (q, do)), k, v, dk, dv, shift, dot, tiles, scale, scale * LOG2E, q.stride(0),
                q.stride(1),
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads, keys, GROUP=group, KIND=kind, A=reach.a,
                B=reach.b, INIT=reach.initial, DK=k.shape[2], DV=v.shape[2], BK=pad_dim(k.shape[2]),
                BV=pad_dim(v.shape[2]),
                ROWS=size.rows, KEYS=size.keys, SPLITS=splits, PREC=precision(q.dtype), TMA=tma, **size.launch,
            )  # fmt: skip
        return dk, dv

    # Early keys are seen by all later queries; parts of the queries keep the first tiles from outlasting the others.
    splits = max(1, min(8, layout.longest // 4096))
    if reach.kind == CMP:
        dk, dv = launch(CMP, tables.key_tiles(layout, size.keys, reach.a, reach.b), splits, k.shape[0])
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


def chunk_tokens(layout: Layout, bytes_per_token: int, budget: int) -> int:
    """Queries of a chunk whose pairs fit the budget."""
    return max(1, min(layout.tokens, max(64, budget // bytes_per_token)))


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


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    selection: Selection,
    scale: float,
    mixed: tuple[Tensor, Tensor | None, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse of the selected branch, the gated sum).

    mixed: (gates [T, Hq, 3], output of the compressed branch or None, of the window); None leaves the sum out.
    """
    tokens, heads, dk = q.shape
    kv_heads, dv = k.shape[1], v.shape[2]
    group, s = heads // kv_heads, selection.select_block
    total = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device) if mixed else None
    if selection.indices is None:
        out, lse = dense_forward(q, k, v, layout, Range.window(max(layout.longest, 1)), scale)
    elif selection.forced:
        out, lse = dense_forward(q, k, v, layout, Range.forced(selection.forced), scale)
    else:
        out = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    gates, cmp, win = mixed if mixed else (q, None, q)

    def merge(first: int, last: int, part: Tensor, part_lse: Tensor, indices: Tensor, count: int) -> None:
        rows = (last - first) * heads
        initial, local = forced_blocks(selection.forced)
        mix.merge_and_mix[(triton.cdiv(rows, 16),)](
            cmp if cmp is not None else q, out, win, lse, part, part_lse, indices, gates, total if mixed else q,
            tables.token_table(layout, s)[0], first * heads, last * heads, heads, GROUP=group, COUNT=count, S=s,
            INITIAL=initial,
            LOCAL=local, HAS_CMP=cmp is not None, SLC=selection.mode, MIX=mixed is not None, DV=dv, BV=pad_dim(dv),
            ROWS=16, num_warps=4,
        )  # fmt: skip

    if selection.indices is None:
        if mixed:
            merge(0, tokens, out, lse, lse, 1)
        return out, lse, total
    count = selection.indices.shape[2]
    chunk = chunk_tokens(layout, heads * count * dv * q.element_size(), PAIR_BYTES_FORWARD)
    size = pair_tiles(q, group, s, False)
    per_tile = size.rows // group
    listed = pairs.list_pairs(selection.indices, layout, s, chunk, forced_blocks(selection.forced))
    part = torch.empty(chunk, kv_heads, count, group, dv, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(chunk, kv_heads, count, group, dtype=torch.float32, device=q.device)
    blocks = tables.selection_table(layout, s)
    for number, first in enumerate(range(0, tokens, chunk)):
        items, _ = listed.items(number, 8 * per_tile)
        pairs.forward_pairs[(len(items),)](
            q, k, v, part, part_lse, items, listed.pairs, blocks, scale * LOG2E, first, len(blocks), q.stride(0),
            q.stride(1),
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), KV_HEADS=kv_heads, COUNT=count, GROUP=group, S=s,
            DK=dk, DV=dv,
            BK=pad_dim(dk), BV=pad_dim(dv), ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), **size.launch,
        )  # fmt: skip
        merge(first, min(first + chunk, tokens), part, part_lse, selection.indices, count)
    return out, lse, total


@dataclass(frozen=True)
class Branch:
    """Keys and values of a branch, and what its backward reads: shift, dot [T, Hq] float32 (mix.gate_gradients)."""

    k: Tensor
    v: Tensor
    shift: Tensor
    dot: Tensor

    def arguments(self, sources: Sequence[TensorDescriptor] | None) -> list[object]:
        """Of the kernel, keys and values by descriptor if given."""
        k, v = self.k, self.v
        return [*(sources or (k, v)), self.shift, self.dot, k.stride(0), k.stride(1), v.stride(0), v.stride(1)]


def backward(
    q: Tensor,
    do: Tensor,
    layout: Layout,
    scale: float,
    cmp: tuple[Branch, Range] | None,
    slc: tuple[Branch, Selection] | None,
    win: tuple[Branch, Range] | None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Gradient of q [T, Hq, Dk], and of keys and values (float32) by branch name."""
    tokens, heads, dk = q.shape
    some = next(branch[0] for branch in (cmp, slc, win) if branch)
    kv_heads, dv = some.k.shape[1], some.v.shape[2]
    group = heads // kv_heads
    grads: dict[str, tuple[Tensor, Tensor]] = {}
    for name, dense_branch in (("cmp", cmp), ("win", win)):
        if dense_branch:
            branch, reach = dense_branch
            grads[name] = dense_keys_backward(q, do, branch.k, branch.v, branch.shift, branch.dot, layout, reach, scale)
    selection = slc[1] if slc else Selection(None, 1, None)
    mode = selection.mode if slc else 0
    if slc:
        grads["slc"] = _selected_keys_start(q, do, slc[0], layout, selection, scale)
    paired = mode in (1, 2)
    count = selection.indices.shape[2] if selection.indices is not None else 1
    chunk = (
        chunk_tokens(layout, heads * count * dk * q.element_size(), PAIR_BYTES_BACKWARD) if paired else max(tokens, 1)
    )
    part = torch.empty(chunk if paired else 0, kv_heads, count, group, dk, dtype=q.dtype, device=q.device)
    listed = None
    if selection.indices is not None:
        listed = pairs.list_pairs(
            selection.indices, layout, selection.select_block, chunk, forced_blocks(selection.forced)
        )

    dq = torch.empty(tokens, heads, dk, dtype=q.dtype, device=q.device)
    size = query_tiles(q, group)
    reach_c = cmp[1] if cmp else Range(CMP, 1)
    tiles = tables.query_tiles(layout, size.rows // group, *reach_c.blocks, chunk)
    initial, local = forced_blocks(selection.forced)
    for number, first in enumerate(range(0, tokens, chunk)):
        if slc and listed:
            _pairs_backward(
                q, do, slc[0], layout, selection.select_block, listed, number, first, count, part, grads["slc"], scale
            )
        branches = [(branch or (some,))[0] for branch in (cmp, slc, win)]
        sources = key_sources([x for branch in branches for x in (branch.k, branch.v)], size)
        arguments = [
            x
            for i, branch in enumerate(branches)
            for x in branch.arguments(sources[2 * i : 2 * i + 2] if sources else None)
        ]
        dense.backward_queries[(len(tiles[number]), kv_heads)](
            q, do, dq, tiles[number], scale, scale * LOG2E, q.stride(0), q.stride(1), heads, *arguments, part,
            selection.indices if paired else tiles[number], first, GROUP=group, HAS_CMP=cmp is not None, SLC=mode,
            HAS_WIN=win is not None, COUNT=count, SKIP=mode == 1, L=reach_c.a, D=reach_c.b, S=selection.select_block,
            LOCAL=local,
            INITIAL_BLOCKS=initial, W=win[1].a if win else 1, WHOLE=max(layout.longest, 1), DK=dk, DV=dv,
            BK=pad_dim(dk), BV=pad_dim(dv),
            ROWS=size.rows, KEYS=size.keys, PREC=precision(q.dtype), TMA=sources is not None, **size.launch,
        )  # fmt: skip
    return dq, grads


def _selected_keys_start(
    q: Tensor, do: Tensor, branch: Branch, layout: Layout, selection: Selection, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the selected branch's keys and values without the pairs'."""
    if selection.mode == 2:
        k, v = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (branch.k, branch.v))
        return k, v
    reach = Range.forced(selection.forced) if selection.forced else Range.window(max(layout.longest, 1))
    return dense_keys_backward(q, do, branch.k, branch.v, branch.shift, branch.dot, layout, reach, scale)


def _pairs_backward(
    q: Tensor, do: Tensor, branch: Branch, layout: Layout, s: int, listed: pairs.PairList, number: int, first: int,
    count: int,
    part: Tensor, totals: tuple[Tensor, Tensor], scale: float,
) -> None:  # fmt: skip
    """Fills part with the query gradients of a chunk's pairs and adds their key and value gradients to totals."""
    k, v = branch.k, branch.v
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    size = pair_tiles(q, group, s, True)
    items, first_item = listed.items(number, 16 * max(8, size.rows // group))
    part_k, part_v = (torch.empty(len(items), s, x.shape[2], dtype=torch.float32, device=q.device) for x in (k, v))
    blocks = tables.selection_table(layout, s)
    pairs.backward_pairs[(len(items),)](
        q, do, k, v, branch.shift, branch.dot, part, part_k, part_v, items, listed.pairs, blocks, scale * LOG2E,
        first, len(blocks),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), KV_HEADS=kv_heads, COUNT=count,
        GROUP=group,
        S=s, DK=k.shape[2], DV=v.shape[2], BK=pad_dim(k.shape[2]), BV=pad_dim(v.shape[2]), ROWS=size.rows,
        KEYS=size.keys,
        PREC=precision(q.dtype), **size.launch,
    )  # fmt: skip
    for x, total, factor in ((part_k, totals[0], scale), (part_v, totals[1], 1.0)):
        pairs.add_items[(len(blocks) * kv_heads,)](
            x, total, first_item, blocks, len(blocks), factor, KV_HEADS=kv_heads, S=s, DIM=x.shape[2],
            BD=pad_dim(x.shape[2]),
            KEYS=size.keys, num_warps=8,
        )  # fmt: skip
