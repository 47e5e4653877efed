"""Native Sparse Attention (arXiv 2502.11089) on packed sequences.

Packed inputs: q [T, Hq, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv], cu_seqlens int32 [B+1]. Every function runs with
autograd. Sequences may be empty or shorter than a block. A size that does not fit is a ValueError that names the
argument. `backend`: "torch" is the definition in plain PyTorch, "triton" the kernels that equal it, "auto" Triton on
CUDA and PyTorch elsewhere.
"""

from __future__ import annotations

import math

from torch import Tensor

from plumbline.kernels.nsa import reference
from plumbline.kernels.nsa.backend import Backend, use_triton
from plumbline.kernels.nsa.cache import DecodePlan, NSACache, NSAStores
from plumbline.kernels.nsa.config import (
    NSAConfig,
    PhiKind,
    PhiParams,
    check_blocks,
    check_counts,
    check_cu_seqlens,
    check_packed,
    check_total,
)
from plumbline.kernels.nsa.decode import decode_step
from plumbline.kernels.nsa.layout import Layout

__all__ = [
    "DecodePlan",
    "Layout",
    "NSACache",
    "NSAConfig",
    "NSAStores",
    "PhiParams",
    "compress",
    "compressed_attention",
    "decode_step",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "window_attention",
]


def compress(
    x: Tensor,
    weight: Tensor,
    position: Tensor,
    cu_seqlens: Tensor,
    *,
    block: int = 32,
    stride: int = 16,
    kind: PhiKind = "linear",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compressed keys or values: block i of a sequence is phi of its tokens [i stride, i stride + block).

    Args:
        x: [T, H, D] keys or values.
        weight, position: see PhiParams.
        cu_seqlens: [B+1] int32.

    Returns:
        (blocks [N, H, D], cu_blocks [B+1] int32), complete blocks only, packed.
    """
    check_blocks(block, stride)
    check_cu_seqlens("cu_seqlens", cu_seqlens)
    if x.ndim != 3:
        raise ValueError(f"x must be packed [tokens, heads, dim], got {list(x.shape)}")
    check_total("x", x, cu_seqlens)
    _check_phi("weight", weight, "position", position, x, block, kind)
    if use_triton(backend, x):
        from plumbline.kernels.nsa.triton_backend.compress import compress as run

        return run(x, weight, position, Layout(cu_seqlens), block, stride, kind)
    return reference.compress(x, weight, position, cu_seqlens, block, stride, kind)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    cu_blocks: Tensor,
    *,
    block: int = 32,
    stride: int = 16,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over complete compressed blocks; a query with none gets zeros and an lse of -inf.

    Args:
        q: [T, Hq, Dqk]; k_cmp, v_cmp: [N, Hkv, D] from compress.

    Returns:
        (out [T, Hq, Dv], lse [T, Hq] float32).
    """
    check_blocks(block, stride)
    check_packed(q, k_cmp, v_cmp, cu_seqlens)
    check_cu_seqlens("cu_blocks", cu_blocks)
    check_total("q", q, cu_seqlens)
    check_total("k_cmp", k_cmp, cu_blocks)
    layout, blocks = Layout(cu_seqlens), Layout(cu_blocks)
    check_counts(layout, blocks, block, stride)
    if blocks.tokens and use_triton(backend, q):
        from plumbline.kernels.nsa.triton_backend import functions

        return functions.compressed_attention(q, k_cmp, v_cmp, layout, block, stride, _scale(q, scale))
    if blocks.tokens == 0:
        return q.new_zeros(*q.shape[:2], v_cmp.shape[2]), q.new_full(q.shape[:2], -math.inf, dtype=reference.wide(q))
    out, lse = reference.compressed_padded(
        layout.pad(q), blocks.pad(k_cmp), blocks.pad(v_cmp), layout, block, stride, _scale(q, scale)
    )
    return layout.unpad(out), layout.unpad(lse[..., None])[..., 0]


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_blocks: Tensor,
    *,
    block: int = 32,
    stride: int = 16,
    select_block: int = 64,
    count: int = 16,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The blocks each query attends to, shared by its group: forced ones, then the highest compressed attention.

    Args:
        q: [T, Hq, Dqk]; k_cmp: [N, Hkv, Dqk]; lse: [T, Hq] from compressed_attention.

    Returns:
        [T, Hkv, count] int32, ascending, -1 = none. No gradient.
    """
    config = NSAConfig(block, stride, select_block, count, initial, local)
    check_packed(q, k_cmp, k_cmp, cu_seqlens)
    check_cu_seqlens("cu_blocks", cu_blocks)
    if lse.shape != q.shape[:2]:
        raise ValueError(f"lse must be [tokens, heads] = {list(q.shape[:2])}, got {list(lse.shape)}")
    check_total("q", q, cu_seqlens)
    check_total("k_cmp", k_cmp, cu_blocks)
    layout, blocks = Layout(cu_seqlens), Layout(cu_blocks)
    check_counts(layout, blocks, block, stride)
    if layout.tokens and use_triton(backend, q):
        from plumbline.kernels.nsa.triton_backend import functions

        return functions.choose_blocks(q, k_cmp, lse, layout, config, _scale(q, scale))
    if layout.tokens == 0:
        return lse.new_zeros(0, k_cmp.shape[1], count, dtype=cu_seqlens.dtype)
    padded = (
        blocks.pad(k_cmp) if blocks.tokens else k_cmp.new_zeros(len(cu_blocks) - 1, k_cmp.shape[1], 0, k_cmp.shape[2])
    )
    indices = reference.select_padded(layout.pad(q), padded, layout, config, _scale(q, scale))
    return layout.unpad(indices)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    *,
    select_block: int = 64,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Exact causal attention over the tokens of the chosen blocks.

    Args:
        block_indices: [T, Hkv, count] int32 from select_blocks (-1 = none).

    Returns:
        [T, Hq, Dv].
    """
    check_packed(q, k, v, cu_seqlens)
    check_total("q", q, cu_seqlens)
    check_total("k", k, cu_seqlens)
    if select_block < 1:
        raise ValueError(f"select_block must be at least 1, got {select_block}")
    if block_indices.ndim != 3 or block_indices.shape[:2] != (q.shape[0], k.shape[1]):
        raise ValueError(
            f"block_indices must be [tokens, kv heads, count] = [{q.shape[0]}, {k.shape[1]}, count], "
            f"got {list(block_indices.shape)}"
        )
    layout = Layout(cu_seqlens)
    if layout.tokens == 0:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    if use_triton(backend, q, select_block):
        from plumbline.kernels.nsa.triton_backend import functions

        return functions.selected_attention(q, k, v, block_indices, layout, select_block, _scale(q, scale))
    indices = layout.pad(block_indices)
    out = reference.selected_padded(
        layout.pad(q), layout.pad(k), layout.pad(v), indices, layout, select_block, _scale(q, scale)
    )
    return layout.unpad(out)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int = 512,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Exact causal attention over the last `window` tokens, the query's own included. Returns [T, Hq, Dv]."""
    check_packed(q, k, v, cu_seqlens)
    check_total("q", q, cu_seqlens)
    check_total("k", k, cu_seqlens)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    layout = Layout(cu_seqlens)
    if layout.tokens == 0:
        return q.new_zeros(0, q.shape[1], v.shape[2])
    if use_triton(backend, q):
        from plumbline.kernels.nsa.triton_backend import functions

        return functions.window_attention(q, k, v, layout, window, _scale(q, scale))
    return layout.unpad(
        reference.window_padded(layout.pad(q), layout.pad(k), layout.pad(v), layout, window, _scale(q, scale))
    )


def native_sparse_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cu_seqlens: Tensor,
    params: PhiParams,
    config: NSAConfig,
    *,
    backend: Backend = "auto",
    layout: Layout | None = None,
    block_indices: Tensor | None = None,
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """g_cmp o_cmp + g_slc o_slc + g_win o_win.

    Args:
        q: [T, Hq, Dqk]; kv_*: (k [T, Hkv, Dqk], v [T, Hkv, Dv]) of each branch.
        gates: [T, Hq, 3], already through the sigmoid (never negative), in the order cmp, slc, win.
        cu_seqlens: [B+1] int32.
        params: of the compression map.
        config: see NSAConfig.
        layout: Layout(cu_seqlens), if the caller has it (all layers of a model share one).
        block_indices: [T, Hkv, count] to attend to instead of choosing (replay of rollout's choice).
        return_blocks: also return the blocks used.

    Returns:
        out [T, Hq, Dv], or (out, indices [T, Hkv, count] int32).
    """
    for k, v in (kv_cmp, kv_slc, kv_win):
        check_packed(q, k, v, cu_seqlens)
        check_total("k", k, cu_seqlens)
    check_total("q", q, cu_seqlens)
    _check_phi(
        "params.k_weight", params.k_weight, "params.k_position", params.k_position, kv_cmp[0], config.block, config.phi
    )
    _check_phi(
        "params.v_weight", params.v_weight, "params.v_position", params.v_position, kv_cmp[1], config.block, config.phi
    )
    if block_indices is not None and (
        block_indices.ndim != 3 or block_indices.shape[:2] != (q.shape[0], kv_slc[0].shape[1])
    ):
        raise ValueError(
            f"block_indices must be [tokens, kv heads, count] = [{q.shape[0]}, {kv_slc[0].shape[1]}, count], "
            f"got {list(block_indices.shape)}"
        )
    if gates.shape != (*q.shape[:2], 3):
        raise ValueError(f"gates must be [tokens, heads, 3] = {[*q.shape[:2], 3]}, got {list(gates.shape)}")
    layout = layout or Layout(cu_seqlens)
    if layout.tokens == 0:
        out = q.new_zeros(0, q.shape[1], kv_cmp[1].shape[2])
        return (out, cu_seqlens.new_zeros(0, kv_cmp[0].shape[1], config.count)) if return_blocks else out
    if use_triton(backend, q, config.select_block):
        from plumbline.kernels.nsa.triton_backend import functions

        scale = _scale(q, config.scale)
        out, indices = functions.native_sparse_attention(
            q, kv_cmp, kv_slc, kv_win, gates, params, config, layout, scale, block_indices
        )
        return (out, indices) if return_blocks else out
    out, indices = reference.native_sparse_attention(
        q, kv_cmp, kv_slc, kv_win, gates, params, config, layout, block_indices
    )
    return (out, indices) if return_blocks else out


def _check_phi(
    weight_name: str, weight: Tensor, position_name: str, position: Tensor, x: Tensor, block: int, kind: PhiKind
) -> None:
    heads, dim = x.shape[1:]
    if position.shape != (heads, block, dim):
        raise ValueError(
            f"{position_name} must be [kv heads, block, dim] = {[heads, block, dim]}, got {list(position.shape)}"
        )
    shapes = {"linear": (heads, block, dim, dim), "mean": (heads, block), "mlp": (heads, block + 1, dim, dim)}
    if kind not in shapes:
        raise ValueError(f"kind must be linear, mean or mlp, got {kind!r}")
    if weight.shape != shapes[kind]:
        raise ValueError(f"{weight_name} of kind {kind} must be {list(shapes[kind])}, got {list(weight.shape)}")


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale if scale is not None else 1 / math.sqrt(q.shape[-1])
