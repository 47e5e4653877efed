"""A step's sequences in parts: one new token each, for the decode kernels; later chunks of prompts, for the same kernels
token by token; whole prompts, for the packed ones. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from plumbline.kernels.nsa import DecodePlan, NSAConfig, NSAStores, PhiParams, decode_step
from plumbline.models.vllm.paged import Branches, Pages, Step, paged_attention, rows_of

Pair = tuple[Tensor, Tensor]

# Tokens of later chunks that the decode kernels take at once: each has scratch for every part of a sequence, about
# 0.25 MB at 32k tokens and 3 kv heads of 64.
CHUNK_ROWS = 512


@dataclass
class Part:
    """Some sequences of a step, and what they do.

    Attributes:
        rows: theirs among the step's new tokens; slice(None): all.
        tables: [B, M] int block tables of the four stores, named as in Branches.
        plan: for the decode kernels, or for paged_attention.
        chunk: tokens of chunks: several rows are of one sequence, each with its block table. All their keys and values go
            into the pages first, since a block that one row completes has tokens of others.
    """

    rows: Tensor | slice
    tables: dict[str, Tensor]
    plan: DecodePlan | Step
    chunk: bool = False

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
        if self.chunk:
            each = torch.arange(len(q), device=q.device)
            for branch, (k, v) in ((pages.cmp, cmp), (pages.slc, slc), (pages.win, win)):
                branch.write(each, self.plan.position, k, v)
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
    if ones:
        rows, own, own_lengths = _members(ones, starts, tables, lengths)
        position = (own_lengths.long() - 1).clamp(min=0)
        parts.append(Part(rows, own, _decode_plan(own, position, config, longest, page)))
    if not others:
        return parts
    after = lengths.tolist()
    later = [row for row in others if kernels and counts[row] < after[row]]
    whole = [row for row in others if not kernels or counts[row] == after[row]]
    plan = None
    for first, last, table_row in _chunk_rows(later, starts):
        position = torch.arange(first, last, device=lengths.device) + (after[table_row] - starts[table_row + 1])
        own = {kind: table[table_row].expand(last - first, -1) for kind, table in tables.items()}
        plan = _decode_plan(own, position, config, longest, page, plan)  # one part runs after the other
        parts.append(Part(torch.arange(first, last, device=lengths.device), own, plan, chunk=True))
    if whole:
        rows, own, _ = _members(whole, starts, tables, lengths)
        ends = accumulate((counts[row] for row in whole), initial=0)
        parts.append(Part(rows, own, Step(list(ends), [after[row] for row in whole], config, lengths.device)))
    return parts


def _members(
    members: list[int], starts: list[int], tables: dict[str, Tensor], lengths: Tensor
) -> tuple[Tensor | slice, dict[str, Tensor], Tensor]:
    """Rows, block tables and lengths of these sequences."""
    if len(members) == len(starts) - 1:
        return slice(None), tables, lengths
    chosen = torch.tensor(members, device=lengths.device)
    own = {kind: table[chosen] for kind, table in tables.items()}
    return rows_of(starts, members, lengths.device), own, lengths[chosen]


def _chunk_rows(members: list[int], starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last, sequence): rows of these sequences, at most CHUNK_ROWS at once."""
    for row in members:
        for first in range(starts[row], starts[row + 1], CHUNK_ROWS):
            yield first, min(first + CHUNK_ROWS, starts[row + 1]), row


def _decode_plan(
    tables: dict[str, Tensor],
    position: Tensor,
    config: NSAConfig,
    longest: int,
    page: int,
    scratch_of: DecodePlan | None = None,
) -> DecodePlan:
    """One new token a row."""
    return DecodePlan(
        tables["slc"], position, config, longest, page=page, longest=longest, tables=tables, scratch_of=scratch_of
    )


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
