"""Native Sparse Attention of new tokens against keys and values in pages, in plain PyTorch.

A serving engine keeps a sequence's cache in pages that a block table lists, and hands over a few new tokens at a time:
one when it decodes, a chunk when it reads a prompt. The functions here equal native_sparse_attention on the whole
sequence. They know no engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from plumbline.kernels.nsa import Layout, NSAConfig, PhiParams, native_sparse_attention
from plumbline.kernels.nsa.config import key_position, overlap_weights
from plumbline.kernels.nsa.reference import (
    SCORES_AT_ONCE,
    block_mask,
    choose,
    compressed_logits,
    compressed_probabilities,
    phi,
    weigh,
    wide,
)


@dataclass(frozen=True)
class Pages:
    """One store of keys and values beside each other, and where each sequence's entries lie in it.

    Attributes:
        store: [pages, H, entries, Dqk + Dv].
        table: [B, M] int, page of each sequence's entries [m P, (m + 1) P) for P entries a page.
        dim: Dqk.
    """

    store: Tensor
    table: Tensor
    dim: int

    def _place(self, rows: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        size = self.store.shape[2]
        return self.table[rows, entries // size].long(), entries % size

    def write(self, rows: Tensor, entries: Tensor, k: Tensor, v: Tensor) -> None:
        """Entry entries[i] of sequence rows[i] becomes k[i], v[i]; rows, entries [n], k [n, H, Dqk], v [n, H, Dv]."""
        page, place = self._place(rows, entries)
        self.store[page, :, place] = torch.cat([k, v], -1).to(self.store.dtype)

    def read(self, rows: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n] or [n, 1], entries [n, s] -> k [n, H, s, Dqk], v [n, H, s, Dv]."""
        page, place = self._place(rows.view(-1, 1), entries)
        found = self.store[page, :, place].transpose(1, 2)
        return found[..., : self.dim], found[..., self.dim :]

    def read_by_head(self, rows: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """As read, with entries of their own for each head: [n, H, s]."""
        page, place = self._place(rows.view(-1, 1, 1), entries)
        heads = torch.arange(entries.shape[1], device=entries.device)[:, None]
        found = self.store[page, heads, place]
        return found[..., : self.dim], found[..., self.dim :]


@dataclass(frozen=True)
class Branches:
    """A layer's pages: raw keys and values of the three branches, and the compressed ones.

    Compressed block i is entry i + l/d - 1 of `blocks`: the entry that holds its last token's stride, so that a page of
    compressed entries depends on no token after those it covers, and can be shared between sequences with one prefix.
    As in NSACache, its key leaves out k_position where no softmax sees that.
    """

    cmp: Pages
    slc: Pages
    win: Pages
    blocks: Pages


def rows_of(starts: list[int], members: list[int], device: torch.device) -> Tensor:
    """Rows of these sequences among a step's new tokens, one sequence after the other. members: one or more."""
    return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in members]).to(device)


class Step:
    """What a step adds to each sequence; shared by all layers.

    Args:
        starts: [B + 1] ints, first row of each sequence among the step's new tokens.
        lengths: [B] ints, tokens of each sequence after the step.
        config: see NSAConfig.
        device: of the index tensors.
    """

    def __init__(self, starts: list[int], lengths: list[int], config: NSAConfig, device: torch.device) -> None:
        self.starts, self.lengths, self.config, self.device = starts, lengths, config, device
        self.counts = [last - first for first, last in pairwise(starts)]
        rows: list[int] = []
        positions: list[int] = []
        block_rows: list[int] = []
        block_numbers: list[int] = []
        for row, (new, length) in enumerate(zip(self.counts, lengths, strict=True)):
            rows += [row] * new
            positions += range(length - new, length)
            # Blocks whose last token i d + l - 1 is among the new ones.
            first = max(0, -(-(length - new - config.block + 1) // config.stride))
            last = (length - config.block) // config.stride if length >= config.block else -1
            block_numbers += range(first, last + 1)
            block_rows += [row] * max(0, last + 1 - first)
        self.rows, self.positions, self.block_rows, self.block_numbers = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (rows, positions, block_rows, block_numbers)
        )

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def whole(self) -> list[int]:
        """Sequences all of whose tokens are new."""
        return [row for row, new in enumerate(self.counts) if new and new == self.lengths[row]]

    @cached_property
    def whole_rows(self) -> Tensor:
        """Their rows, one sequence after the other."""
        return rows_of(self.starts, self.whole, self.device)

    @cached_property
    def whole_layout(self) -> Layout:
        ends = torch.tensor([0, *accumulate(self.counts[row] for row in self.whole)], dtype=torch.int32)
        return Layout(ends.to(self.device))

    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """The other sequences, to attend together: (their numbers [b], their rows [b, n]), by number of new tokens."""
        by_count: dict[int, list[int]] = {}
        whole = set(self.whole)
        for row, new in enumerate(self.counts):
            if new and row not in whole:
                by_count.setdefault(new, []).append(row)
        found = []
        for new, members in by_count.items():
            # One new token each: all in one call. Longer ones one by one, since their scores are large.
            for part in [members] if new == 1 else [[member] for member in members]:
                first = torch.tensor([self.starts[member] for member in part], device=self.device)
                found.append(
                    (torch.tensor(part, device=self.device), first[:, None] + torch.arange(new, device=self.device))
                )
        return found


def paged_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    pages: Branches,
    step: Step,
    params: PhiParams,
) -> Tensor:
    """Put the step's keys and values into the pages and attend from them. No gradient.

    Sequences all of whose tokens are new are read whole, by the packed kernels; others from the pages.

    Args:
        q: [T, Hq, Dqk]; kv_*: (k [T, Hkv, Dqk], v [T, Hkv, Dv]); gates: [T, Hq, 3]: T new tokens, as step numbers them.
        pages: of this layer; they already hold the tokens before the step.
        step: this step's.
        params: of the compression map.

    Returns:
        [T, Hq, Dv].
    """
    config = step.config
    for branch, (k, v) in ((pages.cmp, kv_cmp), (pages.slc, kv_slc), (pages.win, kv_win)):
        branch.write(step.rows, step.positions, k, v)
    if step.block_rows.numel():
        tokens = step.block_numbers[:, None] * config.stride + torch.arange(config.block, device=q.device)
        k, v = pages.cmp.read(step.block_rows, tokens)
        pages.blocks.write(
            step.block_rows,
            step.block_numbers + config.block // config.stride - 1,
            phi(k.to(q.dtype), params.k_weight, key_position(params.k_position, config), config.phi),
            phi(v.to(q.dtype), params.v_weight, params.v_position, config.phi),
        )
    out = torch.empty(q.shape[0], q.shape[1], kv_slc[1].shape[2], dtype=q.dtype, device=q.device)
    if step.whole:
        rows, layout = step.whole_rows, step.whole_layout
        cmp, slc, win = ((k[rows], v[rows]) for k, v in (kv_cmp, kv_slc, kv_win))
        new = native_sparse_attention(
            q[rows], cmp, slc, win, gates[rows], layout.cu_seqlens, params, config, layout=layout
        )
        assert isinstance(new, Tensor)
        out[rows] = new
    for members, rows in step.groups():
        longest = max(step.lengths[member] for member in members.tolist())
        size = max(16, SCORES_AT_ONCE // (len(members) * q.shape[1] * longest))
        for part in rows.split(size, 1):
            t = step.positions[part]
            out[part] = _attend(q[part].transpose(1, 2), gates[part].transpose(1, 2), t, members, pages, config)
    return out


def _attend(q: Tensor, gates: Tensor, t: Tensor, members: Tensor, pages: Branches, config: NSAConfig) -> Tensor:
    """q [b, Hq, n, D], gates [b, Hq, n, 3], t [b, n] positions, members [b] -> [b, n, Hq, Dv]."""
    device, scale = q.device, config.scale if config.scale is not None else 1 / math.sqrt(q.shape[-1])
    last = int(t.max())
    count = (last + 1 - config.block) // config.stride + 1 if last + 1 >= config.block else 0
    number = torch.arange(count, device=device)
    visible = (number * config.stride + config.block - 1 <= t[..., None])[:, None, None]  # [b, 1, 1, n, N]
    entries = number + config.block // config.stride - 1
    unseen = ~visible[:, :, 0].any(-2)[..., None]
    # What no query of a sequence sees may be anything, NaN too, and a row that sees nothing keeps its logits.
    k, v = (
        part.masked_fill(unseen, 0).to(q.dtype) for part in pages.blocks.read(members, entries.expand(len(members), -1))
    )
    probabilities = compressed_probabilities(compressed_logits(q, k, scale), visible)
    out = gates[..., 0, None] * weigh(probabilities, v)

    candidates = last // config.select_block + 1
    weights = overlap_weights(count, candidates, config.block, config.stride, config.select_block, probabilities)
    scores = probabilities.sum(2) @ weights
    chosen = choose(scores, t[:, None], config.select_block, config.count, config.initial, config.local)
    if t.shape[1] == 1 and candidates > config.count:
        # One query a sequence: only the chosen blocks are read.
        tokens = chosen[:, :, 0, :, None] * config.select_block + torch.arange(config.select_block, device=device)
        seen = ((chosen[:, :, 0, :, None] >= 0) & (tokens <= t[:, :, None, None])).flatten(2)
        k, v = pages.slc.read_by_head(members, tokens.flatten(2).clamp(0, last))
        seen = seen[:, :, None]
    else:
        tokens = torch.arange(last + 1, device=device)
        k, v = pages.slc.read(members, tokens.expand(len(members), -1))
        blocks = block_mask(chosen, candidates)
        seen = blocks.repeat_interleave(config.select_block, -1)[..., : last + 1] & (tokens <= t[:, None, :, None])
    out += gates[..., 1, None] * _softmax_attention(q, k, v, seen, scale)

    first = (t.min(1).values - config.window + 1).clamp(min=0)
    width = int((t.max(1).values - first).max()) + 1
    tokens = first[:, None] + torch.arange(width, device=device)
    k, v = pages.win.read(members, tokens.clamp(max=last))
    distance = t[..., None] - tokens[:, None]
    seen = ((distance >= 0) & (distance < config.window))[:, None]
    out += gates[..., 2, None] * _softmax_attention(q, k, v, seen, scale)
    return out.transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """q [b, Hq, n, D], k/v [b, Hkv, s, D], seen [b, 1 or Hkv, n, s] -> [b, Hq, n, Dv]; softmax in float32 or wider."""
    precise = wide(q)
    rows = (q.to(precise) * scale).unflatten(1, (k.shape[1], -1))
    logits = rows @ k.to(precise)[:, :, None].transpose(-1, -2)
    v = v.masked_fill(~seen.any(-2)[..., None], 0)
    p = torch.softmax(logits.masked_fill(~seen[:, :, None], -math.inf), -1)
    return (p @ v.to(precise)[:, :, None]).flatten(1, 2).to(q.dtype)
