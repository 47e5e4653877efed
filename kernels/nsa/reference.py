"""The plain PyTorch definition of every function, vectorised over a padded batch and chunked over long query ranges.

This is what a CPU user runs, and what the Triton kernels must equal. Tensors inside are padded [B, H, L, D].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbline.kernels.nsa.config import NSAConfig, PhiKind, PhiParams, block_counts, overlap_weights
from plumbline.kernels.nsa.layout import Layout

# Entries of the largest score matrix held at once; longer inputs are cut into chunks of queries.
SCORES_AT_ONCE = 2**26


def query_chunks(layout: Layout, heads: int, keys: int) -> list[tuple[int, int]]:
    """Ranges of queries whose [B, heads, queries, keys] scores stay within SCORES_AT_ONCE."""
    size = max(16, SCORES_AT_ONCE // max(1, len(layout.sizes) * heads * keys))
    return [(first, min(first + size, layout.longest)) for first in range(0, layout.longest, size)]


def wide(x: Tensor) -> torch.dtype:
    """float32, or the tensor's own type if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def phi(windows: Tensor, weight: Tensor, position: Tensor | None, kind: PhiKind) -> Tensor:
    """The compression map. windows [..., H, l, D] -> [..., H, D]; weight and position as in PhiParams (None: none)."""
    x = windows if position is None else windows + position
    if kind == "mean":
        return torch.einsum("...hld,hl->...hd", x, weight)
    block = windows.shape[-2]
    flat = x.flatten(-2).movedim(-2, 0)  # [H, ..., l D]
    shape = flat.shape[:-1]
    flat = flat.reshape(shape[0], -1, flat.shape[-1])
    hidden = torch.bmm(flat, weight[:, :block].flatten(1, 2))
    if kind == "mlp":
        hidden = torch.bmm(F.gelu(hidden), weight[:, block])
    return hidden.reshape(*shape, -1).movedim(0, -2)


def compress_padded(
    x: Tensor, weight: Tensor, position: Tensor | None, block: int, stride: int, kind: PhiKind
) -> Tensor:
    """[B, H, L, D] -> [B, H, N, D] with N blocks of the longest sequence; blocks past a sequence's end are garbage."""
    if x.shape[2] < block:
        return x.new_zeros(x.shape[0], x.shape[1], 0, weight.shape[-1] if kind != "mean" else x.shape[3])
    windows = x.unfold(2, block, stride)  # [B, H, N, D, l]
    return phi(windows.permute(0, 2, 1, 4, 3), weight, position, kind).transpose(1, 2)


def compress(
    x: Tensor, weight: Tensor, position: Tensor, cu_seqlens: Tensor, block: int, stride: int, kind: PhiKind
) -> tuple[Tensor, Tensor]:
    layout = Layout(cu_seqlens)
    counts = block_counts(layout.lengths, block, stride)
    cu_blocks = F.pad(counts.cumsum(0), (1, 0)).int()
    padded = compress_padded(layout.pad(x), weight, position, block, stride, kind)
    return Layout(cu_blocks).unpad(padded), cu_blocks


def compressed_logits(q: Tensor, k_cmp: Tensor, scale: float) -> Tensor:
    """q [B, Hq, t, D], k_cmp [B, Hkv, N, D] -> [B, Hkv, G, t, N], float32 or wider."""
    batch, heads, t, dim = q.shape
    kv_heads, precise = k_cmp.shape[1], wide(q)
    rows = (q.to(precise) * scale).reshape(batch, kv_heads, -1, dim)
    return (rows @ k_cmp.to(precise).transpose(-1, -2)).view(batch, kv_heads, heads // kv_heads, t, -1)


def compressed_probabilities(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible blocks (visible broadcasts to logits); a row that sees none is zero."""
    if logits.shape[-1] == 0:
        return logits
    any_visible = visible.any(-1, keepdim=True)
    # A row of -inf alone has no softmax; it keeps its logits and is zeroed afterwards.
    return torch.softmax(logits.masked_fill(any_visible & ~visible, -math.inf), -1) * any_visible.to(logits.dtype)


def choose(scores: Tensor, t: Tensor, select_block: int, count: int, initial: int, local: int) -> Tensor:
    """Selection blocks of each query.

    Args:
        scores: [..., n_t, S] importance of selection blocks, already summed over the group.
        t: [n_t] or broadcastable to scores[..., 0], position of each query.

    Returns:
        [..., n_t, count] int32, ascending, -1 = none.
    """
    candidates = scores.shape[-1]
    j = torch.arange(candidates, device=scores.device)
    own = t[..., None] // select_block
    allowed = j <= own
    forced = allowed & ((j < initial) | (j > own - local))
    ranked = scores.masked_fill(forced, math.inf).masked_fill(~allowed, -math.inf)
    # A stable sort keeps ties at the lower index.
    order = torch.sort(ranked, dim=-1, descending=True, stable=True)
    top = order.indices[..., :count]
    chosen = torch.where(order.values[..., :count] > -math.inf, top, torch.full_like(top, candidates))
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen < candidates, chosen, torch.full_like(chosen, -1)).int()
    return F.pad(chosen, (0, count - chosen.shape[-1]), value=-1) if chosen.shape[-1] < count else chosen


def block_mask(indices: Tensor, blocks: int) -> Tensor:
    """[..., count] block numbers (-1 = none) -> [..., blocks] bool."""
    mask = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    slots = torch.where(indices < 0, torch.full_like(indices, blocks), indices).long()
    return mask.scatter_(-1, slots, True)[..., :blocks]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention. q [B, Hq, t, D], k/v [B, Hkv, s, D]; mask bool [B, Hkv, t, s] or [t, s], None: causal."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and mask.ndim == 4 and groups > 1:
        mask = mask.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
    )


def selected_padded(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Layout, select_block: int, scale: float
) -> Tensor:
    """indices [B, Hkv, L, count]; attends to the tokens of the chosen blocks up to the query."""
    length = layout.longest
    blocks = -(-length // select_block)
    parts = []
    for first, last in query_chunks(layout, q.shape[1], length):
        rows = slice(first, last)
        chosen = block_mask(indices[:, :, rows], blocks)
        tokens = chosen.repeat_interleave(select_block, -1)[..., :length] & layout.causal(first, last)
        # Padding queries chose nothing; let them see themselves so that no row of the softmax is empty.
        tokens |= torch.eye(length, dtype=torch.bool, device=q.device)[rows] & ~layout.valid[:, None, rows, None]
        parts.append(masked_attention(q[:, :, rows], k, v, tokens, scale))
    return torch.cat(parts, 2)


def window_padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int, scale: float) -> Tensor:
    if layout.longest <= window:
        return masked_attention(q, k, v, None, scale)
    parts = []
    for first, last in query_chunks(layout, q.shape[1], 2 * window):
        start = max(0, first - window + 1)
        mask = layout.causal(first, last, window)[:, start:last]
        parts.append(masked_attention(q[:, :, first:last], k[:, :, start:last], v[:, :, start:last], mask, scale))
    return torch.cat(parts, 2)


def weigh(p: Tensor, v: Tensor) -> Tensor:
    """p [B, Hkv, G, t, N], v [B, Hkv, N, Dv] -> [B, Hq, t, Dv]."""
    batch, kv_heads, groups, t, n = p.shape
    return (p.to(v.dtype).reshape(batch, kv_heads, groups * t, n) @ v).view(batch, kv_heads * groups, t, -1)


def compressed_padded(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: Layout, block: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, L, Dv] and lse [B, Hq, L]."""
    outs, lses = [], []
    for first, last in query_chunks(layout, q.shape[1], k_cmp.shape[2]):
        visible = layout.visible_blocks(first, last, k_cmp.shape[2], block, stride)
        logits = compressed_logits(q[:, :, first:last], k_cmp, scale)
        outs.append(weigh(compressed_probabilities(logits, visible), v_cmp))
        lses.append(torch.logsumexp(logits.masked_fill(~visible, -math.inf), -1).flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(lses, 2)


@torch.no_grad()
def choose_by(p: Tensor, first: int, candidates: int, config: NSAConfig) -> Tensor:
    """Compressed probabilities [B, Hkv, G, t, N] of queries first, first + 1, ... -> [B, Hkv, t, count] int32."""
    weights = overlap_weights(p.shape[-1], candidates, config.block, config.stride, config.select_block, p)
    t = torch.arange(first, first + p.shape[3], device=p.device)
    return choose(p.sum(2) @ weights, t, config.select_block, config.count, config.initial, config.local)


@torch.no_grad()
def select_padded(q: Tensor, k_cmp: Tensor, layout: Layout, config: NSAConfig, scale: float) -> Tensor:
    """[B, Hkv, L, count] int32; padding queries get the choice of their position."""
    candidates = -(-layout.longest // config.select_block)
    parts = []
    for first, last in query_chunks(layout, q.shape[1], k_cmp.shape[2]):
        visible = layout.visible_blocks(first, last, k_cmp.shape[2], config.block, config.stride)
        p = compressed_probabilities(compressed_logits(q[:, :, first:last], k_cmp, scale), visible)
        parts.append(choose_by(p, first, candidates, config))
    return torch.cat(parts, 2)


def compress_and_choose(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, layout: Layout, config: NSAConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """compressed_padded's output and select_padded's blocks from the same probabilities."""
    candidates = -(-layout.longest // config.select_block)
    outs, blocks = [], []
    for first, last in query_chunks(layout, q.shape[1], k_cmp.shape[2]):
        visible = layout.visible_blocks(first, last, k_cmp.shape[2], config.block, config.stride)
        p = compressed_probabilities(compressed_logits(q[:, :, first:last], k_cmp, scale), visible)
        outs.append(weigh(p, v_cmp))
        blocks.append(choose_by(p, first, candidates, config))
    return torch.cat(outs, 2), torch.cat(blocks, 2)


def native_sparse_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    params: PhiParams,
    config: NSAConfig,
    layout: Layout,
    block_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All three branches over one padding plan. Returns (out [T, Hq, Dv], indices [T, Hkv, count])."""
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[-1])
    query, gate = layout.pad(q), layout.pad(gates)[..., None]
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (layout.pad(x) for kv in (kv_cmp, kv_slc, kv_win) for x in kv)
    k_blocks = compress_padded(k_cmp, params.k_weight, params.k_position, config.block, config.stride, config.phi)
    v_blocks = compress_padded(v_cmp, params.v_weight, params.v_position, config.block, config.stride, config.phi)
    out_cmp, indices = compress_and_choose(query, k_blocks, v_blocks, layout, config, scale)
    if block_indices is not None:
        indices = layout.pad(block_indices)
    if block_indices is None and layout.longest <= config.count * config.select_block:
        # Every block is chosen whatever the scores: plain causal attention.
        out_slc = masked_attention(query, k_slc, v_slc, None, scale)
    else:
        out_slc = selected_padded(query, k_slc, v_slc, indices, layout, config.select_block, scale)
    out_win = window_padded(query, k_win, v_win, layout, config.window, scale)
    out = gate[..., 0, :] * out_cmp + gate[..., 1, :] * out_slc + gate[..., 2, :] * out_win
    return layout.unpad(out), layout.unpad(indices)
