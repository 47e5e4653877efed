"""Decode steps of a policy that read nothing back from the device, so that a CUDA graph can hold them.

A step appends tokens [B] to slots [B] and returns logits [B, vocab]; whoever draws from them advances the cache's lengths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.kernels import decode
from plumbline.models.cache import PolicyCache
from plumbline.models.policy import Policy


class DenseStep:
    """Full attention: five matrix products and five small kernels a layer.

    Query, key and value projections become views of one matrix, and so do gate and up: new weights copied into the
    parameters are then seen here, and nothing is held twice.

    Args:
        policy: on the device it will run on, in the dtype it will run in.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.layers: list[tuple[Any, Tensor, Tensor | None, Tensor]] = []
        layer: Any
        for layer in policy.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            qkv = _joined(projections, "weight")
            bias = _joined(projections, "bias") if attention.q_proj.bias is not None else None
            assert qkv is not None
            both = _joined([mlp.gate_proj, mlp.up_proj], "weight")
            assert both is not None
            self.layers.append((layer, qkv, bias, both))

    def __call__(self, cache: PolicyCache, slots: Tensor, tokens: Tensor) -> Tensor:
        model, lengths = self.policy.model, cache.lengths
        x = model.embed_tokens(tokens)
        cos, sin = (part.squeeze(1) for part in model.rope(lengths[slots], torch.float32))
        delta = None
        store: Any
        for (layer, qkv_weight, qkv_bias, both_weight), store in zip(self.layers, cache.layers, strict=True):
            attention, before, after = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
            normed = decode.add_rms_norm(x, delta, before.weight, before.eps)
            qkv = F.linear(normed, qkv_weight, qkv_bias)
            norms = None
            if self.policy.config.qk_norm:
                norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
            q = decode.rotate_and_append(qkv, cos, sin, store.k, store.v, slots, lengths, attention.heads, norms)
            out = decode.decode_attention(q, store.k, store.v, slots, lengths, attention.dim**-0.5)
            delta = attention.o_proj(out.flatten(1))
            normed = decode.add_rms_norm(x, delta, after.weight, after.eps)
            delta = layer.mlp.down_proj(decode.silu_mul(F.linear(normed, both_weight)))
        return self.policy.lm_head(decode.add_rms_norm(x, delta, model.norm.weight, model.norm.eps))


class SparseStep:
    """Native Sparse Attention: the policy's own layers, with a plan that any lengths fit.

    On CUDA the four kernels of kernels/nsa/triton_backend/decode.py read lengths on the device. The PyTorch definition asks
    which rows complete a compression block, so on a CPU only the kernels (in Triton's interpreter) are of fixed shape.

    Args:
        policy: on the device it will run on, in the dtype it will run in.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, cache: PolicyCache, slots: Tensor, tokens: Tensor) -> Tensor:
        model = self.policy.model
        plan = cache.fixed_plan(slots)
        x = model.embed_tokens(tokens)
        cos, sin = model.rope(plan.position, x.dtype)
        layer: Any
        for layer, store in zip(model.layers, cache.layers, strict=True):
            x = layer.step(x, cos, sin, store, plan)
        return self.policy.lm_head(model.norm(x))


def _joined(linears: list[nn.Linear], name: str) -> Tensor | None:
    """One tensor with all of theirs below each other; each parameter becomes a view of its part."""
    parts = [getattr(linear, name) for linear in linears]
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole
