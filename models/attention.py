"""The two attentions of a policy layer, each with its packed form and its one-token form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.kernels.nsa import DecodePlan, Layout, NSACache, PhiParams, decode_step, native_sparse_attention
from plumbline.models.cache import FullCache, StepPlan
from plumbline.models.config import PolicyConfig
from plumbline.models.rope import rotate


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections that both kinds share. `branches` is 1 for full attention and 3 for NSA (cmp, slc, win, in order)."""

    def __init__(self, config: PolicyConfig, branches: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.branches = branches
        hidden, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=bias)
        self.k_proj = nn.Linear(hidden, branches * self.kv_heads * self.dim, bias=bias)
        self.v_proj = nn.Linear(hidden, branches * self.kv_heads * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x [T, hidden] -> q [T, Hq, D] and (k, v) [T, Hkv, D] of each branch, queries and keys rotated."""
        q = rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.dim))), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.dim))), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.dim))
        return q, list(zip(k.split(self.kv_heads, 1), v.split(self.kv_heads, 1), strict=True))


class FullAttention(Attention):
    """Causal softmax attention."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config, branches=1)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        store: tuple[FullCache, Tensor, Tensor] | None,
        *_: Tensor | None,
    ) -> Tensor:
        q, [(k, v)] = self.project(x, cos, sin)
        if store is not None:
            cache, slots, _lengths = store
            cache.k[slots, :, : layout.longest] = layout.pad(k).to(cache.k.dtype)
            cache.v[slots, :, : layout.longest] = layout.pad(v).to(cache.v.dtype)
        out = F.scaled_dot_product_attention(
            layout.pad(q), layout.pad(k), layout.pad(v), is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(layout.unpad(out).flatten(1))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: FullCache, plan: StepPlan, *_: Tensor | None) -> Tensor:
        q, [(k, v)] = self.project(x, cos, sin)
        cache.k[plan.slots, :, plan.position] = k.to(cache.k.dtype)
        cache.v[plan.slots, :, plan.position] = v.to(cache.v.dtype)
        # index_select copies whole rows: several times faster on a CPU than indexing with a tensor.
        keys, values = (
            store[:, :, : plan.longest].index_select(0, plan.slots).to(q.dtype) for store in (cache.k, cache.v)
        )
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys, values, attn_mask=plan.mask, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(out[:, :, 0].flatten(1))


class Seen(NamedTuple):
    """What a sparse layer's observer sees of a forward pass.

    x [T, hidden], its input; cos and sin [T, 1, D]; q [T, Hq, D], k_cmp and k_slc [T, Hkv, D], rotated; v_slc [T, Hkv, D].
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    q: Tensor
    k_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    layout: Layout


class SparseAttention(Attention):
    """Native Sparse Attention: three branches of keys and values, mixed by gates that read the layer's input."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config, branches=3)
        self.nsa = config.nsa_config
        self.gate_proj = nn.Linear(config.hidden_size, self.heads * 3)
        heads, dim, block = self.kv_heads, self.dim, self.nsa.block
        shape = {"linear": (heads, block, dim, dim), "mean": (heads, block), "mlp": (heads, block + 1, dim, dim)}[
            self.nsa.phi
        ]
        self.phi_k_weight = nn.Parameter(torch.empty(shape))
        self.phi_k_position = nn.Parameter(torch.zeros(heads, block, dim))
        self.phi_v_weight = nn.Parameter(torch.empty(shape))
        self.phi_v_position = nn.Parameter(torch.zeros(heads, block, dim))
        # Adaptation looks at what a layer ranks by here.
        self.observer: Callable[[SparseAttention, Seen], None] | None = None
        self.reset_phi()

    @torch.no_grad()
    def reset_phi(self) -> None:
        """The mean of the block (mlp: the mean, then GELU, then the identity)."""
        for weight in (self.phi_k_weight, self.phi_v_weight):
            weight.zero_()
            if self.nsa.phi == "mean":
                weight.fill_(1 / self.nsa.block)
                continue
            identity = torch.eye(self.dim, dtype=weight.dtype, device=weight.device)
            weight[:, : self.nsa.block] = identity / self.nsa.block
            if self.nsa.phi == "mlp":
                weight[:, self.nsa.block] = identity

    def phi(self, dtype: torch.dtype) -> PhiParams:
        """The compression map in the dtype of the keys (another one under autocast)."""
        parts = (self.phi_k_weight, self.phi_k_position, self.phi_v_weight, self.phi_v_position)
        return PhiParams(*(part.to(dtype) for part in parts))

    def branch_keys(self, x: Tensor, cos: Tensor, sin: Tensor, number: int, weight: Tensor | None = None) -> Tensor:
        """Rotated keys of one branch [T, Hkv, D], as `project` gives them or with another projection [Hkv D, hidden]."""
        weight = self.k_proj.weight.chunk(3)[number] if weight is None else weight
        bias = None if self.k_proj.bias is None else self.k_proj.bias.chunk(3)[number]
        return rotate(self.k_norm(F.linear(x, weight, bias).unflatten(-1, (-1, self.dim))), cos, sin)

    def gates(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.heads, 3))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        store: tuple[NSACache, Tensor, Tensor] | None,
        replay: Tensor | None = None,
        record: Tensor | None = None,
    ) -> Tensor:
        """store: what to fill, the slots [B] of the sequences, and their lengths [B] without layout's padding.
        replay [T, Hkv, count] int32: blocks to attend to instead of choosing; record, the same, takes those used."""
        q, (cmp, slc, win) = self.project(x, cos, sin)
        gates = self.gates(x)
        if self.observer is not None:
            self.observer(self, Seen(x, cos, sin, q, cmp[0], *slc, layout))
        # The kernels fix their own precision: autocast would round the scores that choose blocks.
        with torch.autocast(x.device.type, enabled=False):
            phi = self.phi(q.dtype)
            if store is not None:
                cache, slots, lengths = store
                cache.prefill(slots, cmp, slc, win, layout, phi, lengths)
            out, blocks = native_sparse_attention(
                q,
                cmp,
                slc,
                win,
                gates,
                layout.cu_seqlens,
                phi,
                self.nsa,
                layout=layout,
                block_indices=replay,
                return_blocks=True,
            )
        if layout.longest < self.nsa.block:
            # No block, so phi is not used. Its gradient is then zero, not missing: sharded learner processes must all
            # reduce the same tensors, and optimizers must step on the same ones however a batch is cut.
            out = _WithInputs.apply(out, *phi)
        if record is not None:
            record.copy_(blocks)
        return self.o_proj(out.flatten(1))

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: NSACache, plan: DecodePlan, record: Tensor | None = None
    ) -> Tensor:
        """record [B, Hkv, count] int32 takes the blocks chosen."""
        q, (cmp, slc, win) = self.project(x, cos, sin)
        gates = self.gates(x)
        with torch.autocast(x.device.type, enabled=False):
            out, blocks = decode_step(q, cmp, slc, win, gates, cache, plan, self.phi(q.dtype), return_blocks=True)
        if record is not None:
            record.copy_(blocks)
        return self.o_proj(out.flatten(1))


class _WithInputs(torch.autograd.Function):
    """The first argument unchanged; the others, which it does not depend on, get a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if need else None
            for need, (shape, dtype, device) in zip(needed, ctx.like, strict=True)
        )
        return grad, *zeros


def open_gate_bias(heads: int) -> Tensor:
    """Gate biases of a converted dense checkpoint, [3 heads]: gates (0, 1, 0) for (cmp, slc, win) to within 1e-8.

    In float32 the sigmoid is then exactly 1 and 1e-8: below the rounding of the sum, yet its gradient is not zero.
    """
    return torch.tensor([-math.log(1e8), math.log(1e8), -math.log(1e8)]).repeat(heads)
