"""The keys and values that decoding reads, in slots or in pages, and the plan of one step over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from plumbline.kernels.nsa.config import NSAConfig, PhiParams, block_counts, key_position, overlap_weights
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.reference import compress_padded

BRANCHES = ("cmp", "slc", "win")


def ring_places(config: NSAConfig, new: int) -> dict[str, int]:
    """Places of the rings that hold what a step of `new` tokens a sequence reads of the raw keys of `cmp` and `win`.

    A ring must hold the step's first token's window, or the block that it completes, beside the step's last token:
    programs of one launch write new tokens while others read old ones. Powers of two, so that kernels find a token's
    place with one AND.
    """
    return {
        branch: 1 << (reach + new - 2).bit_length() for branch, reach in (("cmp", config.block), ("win", config.window))
    }


def slot_rows(config: NSAConfig, max_length: int, new: int = 1) -> dict[str, int]:
    """Rows of keys, and of values, that a slot of max_length tokens takes in `cmp`, `slc`, `win` and `blocks`."""
    rings = ring_places(config, new)
    rows = {branch: min(max_length, rings.get(branch, max_length)) for branch in BRANCHES}
    return rows | {"blocks": int(block_counts(torch.tensor(max_length), config.block, config.stride))}


@dataclass
class NSAStores:
    """Where a layer's keys and values lie, whoever owns the memory.

    Attributes:
        config: see NSAConfig.
        page: tokens of a page of raw keys and values; None: slots.
        raw: `cmp`, `slc`, `win` -> (k [slots or pages, Hkv, L, Dqk], v [slots or pages, Hkv, L, Dv]).
        blocks: (k [slots or pages, Hkv, N, Dqk], v [slots or pages, Hkv, N, Dv]).
        shift: compressed block i is entry i + shift of a sequence's.
        rings: of the raw stores in which token t is row t % places, the places. A store shorter than that holds whole
            sequences.
        new: most tokens of a sequence that a step may append; None: any number.
    """

    config: NSAConfig
    page: int | None
    raw: dict[str, tuple[Tensor, Tensor]]
    blocks: tuple[Tensor, Tensor]
    shift: int = 0
    rings: dict[str, int] = field(default_factory=dict)
    new: int | None = None


class NSACache(NSAStores):
    """Keys and values of one layer: raw for the three branches, compressed for the first.

    In slots, each of `slots` sequences owns max_length tokens of `slc`, their compressed blocks, and rings of `cmp` and
    `win` (see ring_places): nothing reads what is in compressed blocks or has left the window. In pages (`page` tokens
    each, `slots` of them), a sequence owns the pages that its page table names, for all tokens of all branches;
    compressed block i lives in the page of its first token.

    Args:
        slots: sequences, or pages.
        max_length: most tokens of a sequence.
        kv_heads, dim_k, dim_v: heads and head dims.
        config: see NSAConfig.
        page: tokens of a page, a multiple of the stride; None: slots.
        new: most tokens of a sequence that a step will append. Slots alone need to know.
        dtype, device: of the tensors.

    Attributes:
        raw: `cmp`, `slc`, `win` -> (k [slots, Hkv, L, Dqk], v [slots, Hkv, L, Dv]), L being page, or as in slot_rows.
        blocks: (k [slots, Hkv, N, Dqk], v [slots, Hkv, N, Dv]). Where phi is linear or a mean, the keys leave out
            k_position: it adds one vector to all of them, which no softmax sees.
    """

    def __init__(
        self,
        slots: int,
        max_length: int,
        kv_heads: int,
        dim_k: int,
        dim_v: int,
        config: NSAConfig,
        *,
        page: int | None = None,
        new: int = 1,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if page is not None and (page < 1 or page % config.stride):
            raise ValueError(f"page must be a positive multiple of stride ({config.stride}), got {page}")
        if new < 1:
            raise ValueError(f"new must be at least 1, got {new}")
        if page is None:
            rows, rings = slot_rows(config, max_length, new), ring_places(config, new)
        else:
            rows, rings = dict.fromkeys(BRANCHES, page) | {"blocks": page // config.stride}, {}

        def make(store: str) -> tuple[Tensor, Tensor]:
            k, v = (
                torch.zeros(slots, kv_heads, rows[store], dim, dtype=dtype, device=device) for dim in (dim_k, dim_v)
            )
            return k, v

        self.max_length = max_length
        raw = {branch: make(branch) for branch in BRANCHES}
        super().__init__(config, page, raw, make("blocks"), rings=rings, new=new if page is None else None)

    def tensors(self) -> list[Tensor]:
        """All storage, slots first."""
        return [tensor for pair in (*self.raw.values(), self.blocks) for tensor in pair]

    def prefill(
        self,
        slots: Tensor,
        kv_cmp: tuple[Tensor, Tensor],
        kv_slc: tuple[Tensor, Tensor],
        kv_win: tuple[Tensor, Tensor],
        layout: Layout,
        params: PhiParams,
        lengths: Tensor | None = None,
    ) -> None:
        """Fill empty slots [B] (or the pages of a page table [B, n]) with whole packed prompts.

        k/v [T, Hkv, D] as in native_sparse_attention. lengths [B] int64: of the prompts, where layout's sequences hold
        padding after them; None: layout's own.
        """
        if layout.longest > self.max_length:
            raise ValueError(f"a prompt of {layout.longest} tokens does not fit a cache of {self.max_length}")
        config, lengths = self.config, layout.lengths if lengths is None else lengths
        pairs = [
            (store, layout.pad(x))
            for branch, pair in zip(BRANCHES, (kv_cmp, kv_slc, kv_win), strict=True)
            for store, x in zip(self.raw[branch], pair, strict=True)
        ]
        weights = ((params.k_weight, key_position(params.k_position, config)), (params.v_weight, params.v_position))
        for store, x, (weight, position) in zip(self.blocks, kv_cmp, weights, strict=True):
            made = compress_padded(layout.pad(x), weight, position, config.block, config.stride, config.phi)
            pairs.append((store, made))
        for number, (store, x) in enumerate(pairs):
            if self.page is None:
                # Rows past a prompt's end are garbage that the next tokens overwrite before anything reads them.
                kept = x if x.shape[2] <= store.shape[2] else last_tokens(x, lengths, store.shape[2])
                store[slots, :, : kept.shape[2]] = kept.to(store.dtype)
                continue
            # Pages past a prompt's end may be anyone's.
            stride = 1 if number < 2 * len(BRANCHES) else config.stride
            at = torch.arange(x.shape[2], device=x.device)
            reach = lengths if stride == 1 else block_counts(lengths, config.block, stride)
            b, i = (at < reach[:, None]).nonzero(as_tuple=True)
            size = store.shape[2]
            store[slots[b, i // size], :, i % size] = x[b, :, i].to(store.dtype)


def last_tokens(x: Tensor, lengths: Tensor, places: int) -> Tensor:
    """x [B, H, L, D], of which each sequence has lengths [B] -> [B, H, places, D]: what a ring holds after them.

    Each place takes the last token that falls on it; one that no token has come to yet takes the first token.
    """
    newest = lengths[:, None] - 1
    tokens = newest - (newest - torch.arange(places, device=x.device)) % places
    batch = torch.arange(len(x), device=x.device)[:, None]
    return x[batch, :, tokens.clamp(min=0)].transpose(1, 2)


class DecodePlan:
    """What one decode step of `new` tokens a sequence needs to know, shared by all layers.

    Rows are (sequence, new token), the tokens of a sequence together: row b new + i.

    Args:
        slots: [B] int64; for a paged cache the page table [B, n] int64 (entries past a sequence's pages are not read).
        lengths: [B] int64, tokens of each sequence before the step.
        config: see NSAConfig.
        max_length: the cache's.
        new: tokens appended to each sequence.
        page: the cache's.
        longest: a bound on lengths + new, where the caller knows one. The device then is not asked, so that the step
            can be captured in a CUDA graph.
        scratch_of: a plan of the same shape that runs before or after this one, never beside it: they share scratch.
        tables: page tables [B, n] of the stores `cmp`, `slc`, `win` and `blocks`, where each has its own (`slots` is
            then not followed). The kernels alone read them, for one new token a sequence.

    Attributes:
        slots: [R] or [R, n]; position: [R] int64, of each new token.

    Raises:
        ValueError: a sequence that would not fit.
    """

    def __init__(
        self,
        slots: Tensor,
        lengths: Tensor,
        config: NSAConfig,
        max_length: int,
        *,
        new: int = 1,
        page: int | None = None,
        longest: int | None = None,
        tables: dict[str, Tensor] | None = None,
        scratch_of: DecodePlan | None = None,
    ) -> None:
        if new < 1:
            raise ValueError(f"new must be at least 1, got {new}")
        if (page is None) != (slots.ndim == 1):
            raise ValueError(f"slots must be [B], or with pages a page table [B, n], got {list(slots.shape)}")
        self.longest = int(lengths.max()) + new if longest is None else longest
        if self.longest > max_length:
            raise ValueError(f"a sequence of {self.longest} tokens does not fit a cache of {max_length}")
        if page is not None and self.longest > slots.shape[1] * page:
            raise ValueError(f"a sequence of {self.longest} tokens does not fit {slots.shape[1]} pages of {page}")
        self.config, self.new, self.page = config, new, page
        if new == 1:
            self.slots, self.position = slots, lengths
        else:
            self.slots = slots.repeat_interleave(new, 0)
            self.position = (lengths[:, None] + torch.arange(new, device=lengths.device)).flatten()
        if tables is not None and new > 1:
            raise ValueError(f"page tables of each store's own are for one new token, got new = {new}")
        own = self.slots if self.slots.ndim == 2 else self.slots[:, None]
        self.own_tables = tables is not None
        self.tables = tables or dict.fromkeys((*BRANCHES, "blocks"), own)
        self.candidates = -(-self.longest // config.select_block)
        self.blocks = max(0, (self.longest - config.block) // config.stride + 1)
        self._memo: dict[tuple[object, ...], tuple[Tensor, ...]] = scratch_of._memo if scratch_of else {}

    def scratch(self, key: tuple[object, ...], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Tensors of this step that the layers use in turn, made on first use."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    # What follows serves the PyTorch definition alone.

    @cached_property
    def complete(self) -> Tensor:
        """Rows whose token completes a compression block."""
        ends = self.position + 1 - self.config.block
        return ((ends >= 0) & (ends % self.config.stride == 0)).nonzero().squeeze(1)

    @cached_property
    def block_number(self) -> Tensor:
        """[complete] the block that each of them completes."""
        return (self.position[self.complete] + 1 - self.config.block) // self.config.stride

    @cached_property
    def block_tokens(self) -> Tensor:
        """[complete, l] its tokens."""
        first = self.position[self.complete, None] + 1 - self.config.block
        return first + torch.arange(self.config.block, device=first.device)

    @cached_property
    def visible(self) -> Tensor:
        """[R, 1, 1, 1, blocks] bool."""
        config = self.config
        last = torch.arange(self.blocks, device=self.position.device) * config.stride + config.block - 1
        return (last[None] <= self.position[:, None])[:, None, None, None, :]

    @cached_property
    def weights(self) -> Tensor:
        """[blocks, candidates] float32: overlap_weights."""
        config = self.config
        like = torch.zeros((), device=self.position.device)
        return overlap_weights(self.blocks, self.candidates, config.block, config.stride, config.select_block, like)

    @cached_property
    def window(self) -> tuple[Tensor, Tensor]:
        """Tokens of the window [R, w] and their mask [R, 1, 1, w]."""
        width = min(self.config.window, self.longest)
        tokens = self.position[:, None] - width + 1 + torch.arange(width, device=self.position.device)
        return tokens.clamp(min=0), (tokens >= 0)[:, None, None]

    @cached_property
    def all_tokens_mask(self) -> Tensor:
        """[R, 1, 1, longest] bool: not after the row's token."""
        return (torch.arange(self.longest, device=self.position.device) <= self.position[:, None])[:, None, None]

    def place(self, store: Tensor, at: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(slot or page, row in it) of tokens, or of compressed blocks, `at` [R, n] (rows: of these plan rows)."""
        slots = self.slots if rows is None else self.slots[rows]
        size = store.shape[2]
        if self.page is None:
            # Of the raw stores, rings alone may be shorter than a sequence; what is never beyond `size` stays as it is.
            return slots[:, None], at if size >= self.longest else at % size
        return slots.gather(1, at // size), at % size

    def write(self, store: Tensor, at: Tensor, x: Tensor, rows: Tensor | None = None) -> None:
        """x [R, H, D] to rows `at` [R] of each sequence."""
        slots, inside = self.place(store, at[:, None], rows)
        store[slots[:, 0], :, inside[:, 0]] = x.to(store.dtype)

    def read(self, store: Tensor, at: Tensor, rows: Tensor | None = None) -> Tensor:
        """Rows `at` [R, n] of each sequence -> [R, H, n, D]."""
        slots, inside = self.place(store, at, rows)
        return store[slots, :, inside].transpose(1, 2)

    def first(self, store: Tensor, count: int) -> Tensor:
        """The first `count` rows of each sequence, [R, H, count, D]; those past its end are garbage."""
        if self.page is None:
            return store[self.slots, :, :count]
        at = torch.arange(count, device=store.device).expand(len(self.position), -1)
        # Table entries past a sequence's pages are not to be followed.
        stride = 1 if store.shape[2] == self.page else self.config.stride
        return self.read(store, torch.minimum(at, self.position[:, None] // stride))
