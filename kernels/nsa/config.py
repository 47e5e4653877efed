"""Settings and parameters of Native Sparse Attention (arXiv 2502.11089), and the checks that every function shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plumbline.kernels.nsa.layout import Layout

PhiKind = Literal["linear", "mean", "mlp"]


@dataclass(frozen=True)
class NSAConfig:
    """Shape of the three branches.

    Attributes:
        block: l, tokens of a compression block.
        stride: d, tokens between the starts of compression blocks; divides block and select_block.
        select_block: l', tokens of a selection block.
        count: n, selection blocks a query attends to, forced ones included.
        initial: blocks at the start that are always chosen.
        local: newest blocks that are always chosen (the query's own and those before it).
        window: w, tokens of the sliding window, the query's own included.
        phi: kind of the compression map.
        scale: factor of the logits; None is 1 / sqrt(Dqk).

    Raises:
        ValueError: a size that does not fit, named.
    """

    block: int = 32
    stride: int = 16
    select_block: int = 64
    count: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    phi: PhiKind = "linear"
    scale: float | None = None

    def __post_init__(self) -> None:
        check_blocks(self.block, self.stride, self.select_block, self.count, self.initial, self.local)
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.phi not in ("linear", "mean", "mlp"):
            raise ValueError(f"phi must be linear, mean or mlp, got {self.phi!r}")


class PhiParams(NamedTuple):
    """Parameters of the compression map, one set for keys and one for values.

    Shapes for kv heads H, block l, head dim D (Dqk for keys, Dv for values):
        position: [H, l, D], added to each token of a block.
        weight: `linear` [H, l, D, D] (sum over l and the input dim); `mean` [H, l], the pool's weights;
            `mlp` [H, l + 1, D, D]: the first l as in `linear`, then GELU, then the last [D, D].
    """

    k_weight: Tensor
    k_position: Tensor
    v_weight: Tensor
    v_position: Tensor


def check_blocks(
    block: int, stride: int, select_block: int = 0, count: int = 0, initial: int = 0, local: int = 0
) -> None:
    """ValueError unless stride divides block and select_block, all are positive, and count holds the forced blocks."""
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if block < 1 or block % stride:
        raise ValueError(f"block ({block}) must be a positive multiple of stride ({stride})")
    if select_block % stride or select_block < 0:
        raise ValueError(f"select_block ({select_block}) must be a positive multiple of stride ({stride})")
    if initial < 0 or local < 0:
        raise ValueError(f"initial ({initial}) and local ({local}) must not be negative")
    if count < initial + local:
        raise ValueError(f"count ({count}) must hold the forced blocks: initial ({initial}) + local ({local})")


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError unless q [T, Hq, Dqk], k [T, Hkv, Dqk], v [T, Hkv, Dv] and cu_seqlens [B+1] int32 fit together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(f"{name} must be packed [tokens, heads, dim], got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and q {q.dtype}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, no multiple of k's {k.shape[1]}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads and v {v.shape[1]}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q has head dim {q.shape[2]} and k {k.shape[2]}")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k has {k.shape[0]} rows and v {v.shape[0]}")
    check_cu_seqlens("cu_seqlens", cu_seqlens)


def check_cu_seqlens(name: str, cu_seqlens: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 [sequences + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")


def check_total(name: str, x: Tensor, cumulative: Tensor) -> None:
    """ValueError unless x lies where the cumulative lengths do. (That they end at x's rows is asked on a CPU only.)"""
    if x.device != cumulative.device:
        raise ValueError(f"{name} is on {x.device} and its cumulative lengths are on {cumulative.device}")
    if x.device.type == "cpu" and int(cumulative[-1]) != x.shape[0]:
        raise ValueError(f"{name} has {x.shape[0]} rows, its cumulative lengths end at {int(cumulative[-1])}")


def check_counts(layout: Layout, blocks: Layout, block: int, stride: int) -> None:
    """ValueError unless cu_blocks counts the complete blocks of cu_seqlens."""
    expected = [(n - block) // stride + 1 if n >= block else 0 for n in layout.sizes]
    if blocks.sizes != expected:
        raise ValueError(
            f"cu_blocks must count the complete blocks of cu_seqlens ({expected[:8]} ...), got {blocks.sizes[:8]} ..."
        )


def key_position(k_position: Tensor, config: NSAConfig) -> Tensor | None:
    """k_position where compressed keys hold it. Unless phi is an mlp, it adds the same vector to all of them, which no
    softmax sees: left out, it costs no precision, and its gradient is zero."""
    return k_position if config.phi == "mlp" else None


def block_counts(lengths: Tensor, block: int, stride: int) -> Tensor:
    """Complete compression blocks of sequences of these lengths."""
    return torch.where(lengths >= block, (lengths - block) // stride + 1, torch.zeros_like(lengths))


def overlap_weights(
    blocks: int, select_blocks: int, block: int, stride: int, select_block: int, like: Tensor
) -> Tensor:
    """[blocks, select_blocks]: how often compression block i counts for selection block j.

    score_j = sum over m in [0, l'/d), n in [0, l/d) of p[(l'/d) j + m - n], so the weight is the number of pairs (m, n)
    with (l'/d) j + m - n = i.
    """
    per_select, per_block = select_block // stride, block // stride
    i = torch.arange(blocks, device=like.device)[:, None]
    offset = i - per_select * torch.arange(select_blocks, device=like.device)[None]
    # m - n = offset with 0 <= m < per_select and 0 <= n < per_block.
    pairs = torch.minimum(offset + per_block, torch.full_like(offset, per_select)) - offset.clamp(min=0)
    return pairs.clamp(min=0).to(like.dtype)
