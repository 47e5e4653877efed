"""One new token a sequence against cached raw and compressed keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plumbline.kernels.nsa.config import NSAConfig, PhiParams, block_counts, overlap_weights
from plumbline.kernels.nsa.layout import Layout
from plumbline.kernels.nsa.reference import (
    choose,
    compress_padded,
    compressed_logits,
    compressed_probabilities,
    phi,
    weigh,
)

BRANCHES = ("cmp", "slc", "win")


class NSACache:
    """Keys and values of one layer in fixed slots: raw for the three branches, compressed for the first.

    Args:
        slots: sequences.
        max_length: tokens a slot can hold.
        kv_heads, dim_k, dim_v: heads and head dims.
        config: see NSAConfig.
        dtype, device: of the tensors.

    Attributes:
        raw: `cmp`, `slc`, `win` -> (k [slots, Hkv, max_length, Dqk], v [slots, Hkv, max_length, Dv]).
        blocks: (k [slots, Hkv, N, Dqk], v [slots, Hkv, N, Dv]).
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
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        def make(length: int, dim: int) -> Tensor:
            return torch.zeros(slots, kv_heads, length, dim, dtype=dtype, device=device)

        self.config = config
        self.max_length = max_length
        self.raw = {branch: (make(max_length, dim_k), make(max_length, dim_v)) for branch in BRANCHES}
        count = int(block_counts(torch.tensor(max_length), config.block, config.stride))
        self.blocks = (make(count, dim_k), make(count, dim_v))

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
    ) -> None:
        """Fill empty slots [B] with whole packed prompts: k/v [T, Hkv, D] as in native_sparse_attention."""
        if layout.longest > self.max_length:
            raise ValueError(f"a prompt of {layout.longest} tokens does not fit a cache of {self.max_length}")
        for branch, pair in zip(BRANCHES, (kv_cmp, kv_slc, kv_win), strict=True):
            for store, x in zip(self.raw[branch], pair, strict=True):
                # Rows past a prompt's end are garbage that the next tokens overwrite before anything reads them.
                store[slots, :, : layout.longest] = layout.pad(x).to(store.dtype)
        config = self.config
        weights = ((params.k_weight, params.k_position), (params.v_weight, params.v_position))
        for store, x, (weight, position) in zip(self.blocks, kv_cmp, weights, strict=True):
            made = compress_padded(layout.pad(x), weight, position, config.block, config.stride, config.phi)
            store[slots, :, : made.shape[2]] = made.to(store.dtype)


class DecodePlan:
    """Index tensors of one decode step, shared by all layers.

    Args:
        slots: [B] int64.
        lengths: [B] int64, tokens in each slot before the step.
        config: see NSAConfig.
        max_length: the cache's.
    """

    def __init__(self, slots: Tensor, lengths: Tensor, config: NSAConfig, max_length: int) -> None:
        longest = int(lengths.max()) + 1
        if longest > max_length:
            raise ValueError(f"a sequence of {longest} tokens does not fit a cache of {max_length}")
        device = slots.device
        self.slots, self.position = slots, lengths
        self.rows = slots[:, None]
        self.longest = longest
        # Sequences whose newest token completes a compression block, and that block's number and tokens.
        ends = lengths + 1 - config.block
        self.complete = ((ends >= 0) & (ends % config.stride == 0)).nonzero().squeeze(1)
        self.block_number = (ends // config.stride)[self.complete]
        self.block_tokens = ends[self.complete, None] + torch.arange(config.block, device=device)
        self.blocks = int(block_counts(torch.tensor(longest), config.block, config.stride))
        last = torch.arange(self.blocks, device=device) * config.stride + config.block - 1
        self.visible = (last[None] <= lengths[:, None])[:, None, None, None, :]
        self.candidates = -(-longest // config.select_block)
        width = min(config.window, longest)
        tokens = lengths[:, None] - width + 1 + torch.arange(width, device=device)
        self.window_mask = (tokens >= 0)[:, None, None]
        self.window_tokens = tokens.clamp(min=0)
        self.weights = overlap_weights(
            self.blocks,
            self.candidates,
            config.block,
            config.stride,
            config.select_block,
            torch.zeros((), device=device),
        )
        self.all_tokens_mask = (torch.arange(longest, device=device) <= lengths[:, None])[:, None, None]


def decode_step(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cache: NSACache,
    plan: DecodePlan,
    params: PhiParams,
    *,
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append one token a sequence to the cache and attend from it.

    Args:
        q: [B, Hq, Dqk]; kv_*: (k [B, Hkv, Dqk], v [B, Hkv, Dv]); gates: [B, Hq, 3].
        cache: this layer's.
        plan: this step's.
        params: of the compression map.
        return_blocks: also return the chosen blocks.

    Returns:
        out [B, Hq, Dv], or (out, indices [B, Hkv, count] int32).
    """
    config = cache.config
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[-1])
    for branch, pair in zip(BRANCHES, (kv_cmp, kv_slc, kv_win), strict=True):
        for store, x in zip(cache.raw[branch], pair, strict=True):
            store[plan.slots, :, plan.position] = x.to(store.dtype)
    if plan.complete.numel():
        _complete_blocks(cache, plan, params)

    query = q[:, :, None]
    k_blocks, v_blocks = (store[plan.slots, :, : plan.blocks] for store in cache.blocks)
    probabilities = compressed_probabilities(compressed_logits(query, k_blocks.to(q.dtype), scale), plan.visible)
    out = gates[..., 0, None] * weigh(probabilities, v_blocks.to(q.dtype))[:, :, 0]

    importance = probabilities.sum(2) @ plan.weights.to(probabilities.dtype)
    indices = choose(
        importance, plan.position[:, None, None], config.select_block, config.count, config.initial, config.local
    )
    indices = indices[:, :, 0]
    k_slc, v_slc, mask = _selected(cache, plan, indices)
    out = out + gates[..., 1, None] * _attend(q, k_slc, v_slc, mask, scale)

    k_win, v_win = (store[plan.rows, :, plan.window_tokens].transpose(1, 2) for store in cache.raw["win"])
    out = out + gates[..., 2, None] * _attend(q, k_win, v_win, plan.window_mask, scale)
    return (out, indices) if return_blocks else out


def _complete_blocks(cache: NSACache, plan: DecodePlan, params: PhiParams) -> None:
    slots = plan.slots[plan.complete]
    weights = ((params.k_weight, params.k_position), (params.v_weight, params.v_position))
    for store, raw, (weight, position) in zip(cache.blocks, cache.raw["cmp"], weights, strict=True):
        windows = raw[slots[:, None], :, plan.block_tokens].transpose(1, 2)
        store[slots, :, plan.block_number] = phi(windows.to(weight.dtype), weight, position, cache.config.phi).to(
            store.dtype
        )


def _selected(cache: NSACache, plan: DecodePlan, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, Hkv, S, D] of the chosen blocks, and their mask [B, Hkv, 1, S]."""
    config = cache.config
    if plan.candidates <= config.count:
        k, v = (store[plan.slots, :, : plan.longest] for store in cache.raw["slc"])
        return k, v, plan.all_tokens_mask
    tokens = indices[..., None] * config.select_block + torch.arange(config.select_block, device=indices.device)
    mask = ((indices[..., None] >= 0) & (tokens <= plan.position[:, None, None, None])).flatten(2)
    tokens = tokens.flatten(2).clamp(0, cache.max_length - 1)
    heads = torch.arange(indices.shape[1], device=indices.device)[None, :, None]
    k, v = (store[plan.slots[:, None, None], heads, tokens] for store in cache.raw["slc"])
    return k, v, mask[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [B, Hq, D], k/v [B, Hkv, S, D], mask [B, 1 or Hkv, 1, S] -> [B, Hq, Dv]."""
    batch, heads, dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, dim).float()
    logits = (grouped @ k.float().transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (torch.softmax(logits, -1) @ v.float()).to(q.dtype).view(batch, heads, -1)
