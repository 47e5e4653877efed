"""The definitions, in plain PyTorch, that the kernels of this folder must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See attention.decode_attention; in float64."""
    rows = []
    for row, slot in enumerate(slots.tolist()):
        n = int(lengths[slot]) + 1
        group = q.shape[1] // k.shape[1]
        keys = k[slot, :, :n].double().repeat_interleave(group, 0)
        values = v[slot, :, :n].double().repeat_interleave(group, 0)
        weights = torch.softmax((keys @ q[row].double()[:, :, None]).squeeze(-1) * scale, -1)
        rows.append((weights[:, None] @ values).squeeze(1))
    return torch.stack(rows)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm times weight)."""
    x = x if delta is None else x + delta
    return x, F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
