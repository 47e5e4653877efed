"""A step's sequences in two parts: those with one new token, for the decode kernels, and the others. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from plumbline.kernels.nsa import DecodePlan, NSAConfig, NSAStores, PhiParams, decode_step
from plumbline.models.vllm.paged import Branches, Pages, Step, paged_attention, rows_of

Pair = tuple[Tensor, Tensor]


@dataclass
class Part:
    """Some sequences of a step, and what they do.

    Attributes:
        rows: theirs among the step's new tokens; slice(None): all.
        tables: [B, M] int block tables of the four stores, named as in Branches.
        plan: for the decode kernels, or for paged_attention.
    """

    rows: Tensor | slice
    tables: dict[str, Tensor]
    plan: DecodePlan | Step

    def attend(
        self,
        q: Tensor,
        kv_cmp: Pair,
        kv_slc: Pair,
        kv_win: Pair,
        gates: Tensor,
        stores: dict[str, Tensor],
        phi: PhiParams,
    ) -> Tensor:
        """As paged_attention, on these rows of the step's tensors: [R, Hq, Dv]."""
        dim = q.shape[-1]
        pages = Branches(**{kind: Pages(store, self.tables[kind], dim) for kind, store in stores.items()})
        q, gates = q[self.rows], gates[self.rows]
        cmp, slc, win = ((k[self.rows], v[self.rows]) for k, v in (kv_cmp, kv_slc, kv_win))
        if isinstance(self.plan, Step):
            return paged_attention(q, cmp, slc, win, gates, pages, self.plan, phi)
        return paged_decode(q, cmp, slc, win, gates, pages, self.plan, phi)


def divide(
    starts: list[int],
    lengths: Tensor,
    longest: int,
    tables: dict[str, Tensor],
    config: NSAConfig,
    page: int,
    kernels: bool,
) -> list[Part]:
    """The parts of a step.

    Args:
        starts: [B + 1] ints, first row of each sequence among the step's new tokens.
        lengths: [B] int, tokens of each sequence after the step, on the device. 0: a row that only pads the batch.
        longest: a bound on them.
        tables: of the four stores.
        config: see NSAConfig.
        page: tokens of a page of raw keys and values.
        kernels: whether the decode kernels run. Where all sequences have one new token, the host then waits for nothing.
    """
    counts = [last - first for first, last in pairwise(starts)]
    ones = [row for row, new in enumerate(counts) if new == 1 and kernels]
    others = [row for row, new in enumerate(counts) if new > 1 or not kernels]
    parts = []
    for members in (ones, others):
        if not members:
            continue
        rows: Tensor | slice = slice(None)
        own, own_lengths = tables, lengths
        if len(members) < len(counts):
            rows = rows_of(starts, members, lengths.device)
            chosen = torch.tensor(members, device=lengths.device)
            own, own_lengths = {kind: table[chosen] for kind, table in tables.items()}, lengths[chosen]
        plan: DecodePlan | Step
        if members is ones:
            position = (own_lengths.long() - 1).clamp(min=0)
            plan = DecodePlan(own["slc"], position, config, longest, page=page, longest=longest, tables=own)
        else:
            ends = accumulate((counts[row] for row in members), initial=0)
            plan = Step(list(ends), own_lengths.tolist(), config, lengths.device)
        parts.append(Part(rows, own, plan))
    return parts


def paged_decode(
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair,
    kv_win: Pair,
    gates: Tensor,
    pages: Branches,
    plan: DecodePlan,
    phi: PhiParams,
) -> Tensor:
    """As paged_attention, for one new token of each sequence. ValueError: the kernels do not run (see use_triton)."""
    config = plan.config
    raw = {"cmp": _pair(pages.cmp), "slc": _pair(pages.slc), "win": _pair(pages.win)}
    stores = NSAStores(config, plan.page, raw, _pair(pages.blocks), shift=config.block // config.stride - 1)
    out = decode_step(q, kv_cmp, kv_slc, kv_win, gates, stores, plan, phi, backend="triton")
    assert isinstance(out, Tensor)
    return out


def _pair(pages: Pages) -> Pair:
    return pages.store[..., : pages.dim], pages.store[..., pages.dim :]
