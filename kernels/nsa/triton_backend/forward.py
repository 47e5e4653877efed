"""Host side of the selected branch's forward, with the gated sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.triton_backend import launch, mix, pairs, tables
from plumbline.kernels.nsa.triton_backend.common import LOG2E, pad_dim, precision
from plumbline.kernels.nsa.triton_backend.launch import Range, Selection, dense_forward, forced_blocks
from plumbline.kernels.nsa.triton_backend.listing import PairList
from plumbline.kernels.nsa.triton_backend.parts import widths


@dataclass(frozen=True)
class Compressed:
    """What the gated sum reads of the compressed branch.

    Attributes:
        out: [T, Hq, Dv], attention to values without base.
        lse: [T, Hq] float32 in log 2.
        base: [Hkv, Dv] float32, what every value was stored without.
    """

    out: Tensor
    lse: Tensor
    base: Tensor


class PairParts:
    """Room for the outputs of a chunk's pairs, and the kernel that fills it."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, selection: Selection, listed: PairList,
        scale: float,
    ) -> None:  # fmt: skip
        assert selection.indices is not None
        self.q, self.k, self.v, self.listed, self.scale = q, k, v, listed, scale
        self.select_block, self.count = selection.select_block, selection.indices.shape[2]
        kv_heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        sizes = (listed.chunk, kv_heads, self.count, self.group)
        self.out = torch.empty(*sizes, v.shape[2], dtype=q.dtype, device=q.device)
        self.lse = torch.empty(*sizes, dtype=torch.float32, device=q.device)
        self.blocks = tables.selection_table(layout, self.select_block)
        self.size = launch.pair_tiles(q, v.shape[2], self.group, self.select_block, False)
        self.items = listed.items(8 * (self.size.rows // self.group))

    def fill(self, number: int) -> None:
        """With the pairs of chunk `number`."""
        q, k, v, size, items = self.q, self.k, self.v, self.size, self.items.items[number]
        bk, bk2 = widths(k.shape[2])
        pairs.forward_pairs[(len(items),)](
            q, k, v, self.out, self.lse, items, self.listed.pairs, self.blocks, self.scale * LOG2E,
            number * self.listed.chunk, len(self.blocks), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), KV_HEADS=k.shape[1], COUNT=self.count, GROUP=self.group, S=self.select_block,
            DK=k.shape[2], DV=v.shape[2], BK=bk, BK2=bk2, BV=pad_dim(v.shape[2]), ROWS=size.rows,
            KEYS=size.keys, PREC=precision(q.dtype), **size.launch,
        )  # fmt: skip


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    selection: Selection,
    scale: float,
    listed: PairList | None,
    mixed: tuple[Tensor, Compressed | None, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, lse of the selected branch, the gated sum). listed: selection.listed(...).

    mixed: (gates [T, Hq, 3], the compressed branch or None, output of the window); None leaves the sum out.
    """
    tokens, heads, _ = q.shape
    dv, group, s = v.shape[2], heads // k.shape[1], selection.select_block
    total = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device) if mixed else None
    if selection.indices is None:
        out, lse = dense_forward(q, k, v, layout, Range.everything(), scale)
    elif selection.forced:
        out, lse = dense_forward(q, k, v, layout, Range.forced(selection.forced), scale)
    else:
        out = torch.empty(tokens, heads, dv, dtype=q.dtype, device=q.device)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    gates, cmp, win = mixed if mixed else (q, None, q)
    parts = PairParts(q, k, v, layout, selection, listed, scale) if listed else None
    initial, local = forced_blocks(selection.forced)
    chunk = listed.chunk if listed else max(tokens, 1)
    if not (parts or mixed):
        return out, lse, None
    for number, first in enumerate(range(0, tokens, chunk)):
        last = min(first + chunk, tokens)
        if parts:
            parts.fill(number)
        mix.merge_and_mix[(triton.cdiv((last - first) * heads, 16),)](
            *((cmp.out, cmp.lse, cmp.base) if cmp else (q, lse, lse)), out, win, lse,
            parts.out if parts else q, parts.lse if parts else lse,
            selection.indices if parts else lse, gates, total if mixed else q, tables.token_table(layout, s)[0],
            first * heads, last * heads, heads, GROUP=group, COUNT=parts.count if parts else 1, S=s, INITIAL=initial,
            LOCAL=local, HAS_CMP=bool(cmp), SLC=selection.mode, MIX=mixed is not None, DV=dv, BV=pad_dim(dv),
            ROWS=16, num_warps=4,
        )  # fmt: skip
    return out, lse, total
