"""One or a few new tokens a sequence against cached raw and compressed keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plumbline.kernels.nsa.backend import Backend, use_triton
from plumbline.kernels.nsa.cache import BRANCHES, DecodePlan, NSAStores
from plumbline.kernels.nsa.config import PhiParams, key_position
from plumbline.kernels.nsa.reference import choose, compressed_logits, compressed_probabilities, phi, weigh


def decode_step(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cache: NSAStores,
    plan: DecodePlan,
    params: PhiParams,
    *,
    backend: Backend = "auto",
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append plan.new tokens a sequence to the cache and attend from them. No gradient.

    Args:
        q: [R, Hq, Dqk], R rows as in DecodePlan; kv_*: (k [R, Hkv, Dqk], v [R, Hkv, Dv]); gates: [R, Hq, 3].
        cache: this layer's.
        plan: this step's.
        params: of the compression map.
        return_blocks: also return the chosen blocks.

    Returns:
        out [R, Hq, Dv], or (out, indices [R, Hkv, count] int32).
    """
    config = cache.config
    if q.shape[0] != len(plan.position):
        raise ValueError(f"q has {q.shape[0]} rows, the plan {len(plan.position)}")
    if plan.page != cache.page:
        raise ValueError(f"the plan is for pages of {plan.page} tokens, the cache has {cache.page}")
    if cache.new is not None and plan.new > cache.new:
        raise ValueError(f"the plan appends {plan.new} tokens a sequence, the cache is made for new = {cache.new}")
    if cache.page is None and plan.longest > cache.raw["slc"][0].shape[2]:
        held = cache.raw["slc"][0].shape[2]
        raise ValueError(f"the plan is for sequences of {plan.longest} tokens, the cache holds {held}")
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[-1])
    if use_triton(backend, q, config.select_block):
        from plumbline.kernels.nsa.triton_backend.decode import decode

        out, indices = decode(q, kv_cmp, kv_slc, kv_win, gates, cache, plan, params, scale)
        return (out, indices) if return_blocks else out
    if plan.own_tables or cache.shift:
        raise ValueError("stores with page tables of their own need backend triton")
    for branch, pair in zip(BRANCHES, (kv_cmp, kv_slc, kv_win), strict=True):
        for store, x in zip(cache.raw[branch], pair, strict=True):
            plan.write(store, plan.position, x)
    if plan.complete.numel():
        _complete_blocks(cache, plan, params)

    query = q[:, :, None]
    k_blocks, v_blocks = (plan.first(store, plan.blocks) for store in cache.blocks)
    probabilities = compressed_probabilities(compressed_logits(query, k_blocks.to(q.dtype), scale), plan.visible)
    out = gates[..., 0, None] * weigh(probabilities, v_blocks.to(q.dtype))[:, :, 0]

    importance = probabilities.sum(2) @ plan.weights.to(probabilities.dtype)
    indices = choose(
        importance, plan.position[:, None, None], config.select_block, config.count, config.initial, config.local
    )
    indices = indices[:, :, 0]
    k_slc, v_slc, mask = _selected(cache, plan, indices)
    out = out + gates[..., 1, None] * _attend(q, k_slc, v_slc, mask, scale)

    tokens, mask = plan.window
    k_win, v_win = (plan.read(store, tokens) for store in cache.raw["win"])
    out = out + gates[..., 2, None] * _attend(q, k_win, v_win, mask, scale)
    return (out, indices) if return_blocks else out


def _complete_blocks(cache: NSAStores, plan: DecodePlan, params: PhiParams) -> None:
    weights = ((params.k_weight, key_position(params.k_position, cache.config)), (params.v_weight, params.v_position))
    for store, raw, (weight, position) in zip(cache.blocks, cache.raw["cmp"], weights, strict=True):
        windows = plan.read(raw, plan.block_tokens, plan.complete)
        made = phi(windows.to(weight.dtype), weight, position, cache.config.phi)
        plan.write(store, plan.block_number, made, plan.complete)


def _selected(cache: NSAStores, plan: DecodePlan, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [R, Hkv, S, D] of the chosen blocks, and their mask [R, Hkv, 1, S]."""
    config = cache.config
    if plan.candidates <= config.count:
        k, v = (plan.first(store, plan.longest) for store in cache.raw["slc"])
        return k, v, plan.all_tokens_mask
    tokens = indices[..., None] * config.select_block + torch.arange(config.select_block, device=indices.device)
    mask = ((indices[..., None] >= 0) & (tokens <= plan.position[:, None, None, None])).flatten(2)
    tokens = torch.minimum(tokens.flatten(2).clamp(min=0), plan.position[:, None, None])
    heads = torch.arange(indices.shape[1], device=indices.device)[None, :, None]
    stores = cache.raw["slc"]
    slots, inside = plan.place(stores[0], tokens.flatten(1))
    slots = slots.unflatten(1, tokens.shape[1:]) if plan.page else slots[..., None]
    k, v = (store[slots, heads, inside.view_as(tokens)] for store in stores)
    return k, v, mask[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [R, Hq, D], k/v [R, Hkv, S, D], mask [R, 1 or Hkv, 1, S] -> [R, Hq, Dv]."""
    rows, heads, dim = q.shape
    grouped = q.view(rows, k.shape[1], -1, dim).float()
    logits = (grouped @ k.float().transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return (torch.softmax(logits, -1) @ v.float()).to(q.dtype).view(rows, heads, -1)
