"""Decode steps of a policy that read nothing back from the device, so that a CUDA graph can hold them.

A step appends tokens [B] to slots [B] and returns logits [B, vocab]; whoever draws from them advances the cache's lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.kernels import decode
from plumbline.kernels.nsa import DecodePlan, decode_step
from plumbline.models.cache import PolicyCache
from plumbline.models.policy import Policy

# Matrix products of 16-bit rows want them to start at multiples of 16 bytes; this is also half a tile.
ROWS_MULTIPLE = 64


@dataclass
class _Layer:
    """A layer with its matrices joined: all that attention projects, and the MLP's gate and up."""

    layer: Any
    weight: Tensor
    bias: Tensor | None
    both: Tensor


@dataclass
class _Now:
    """What the layers of one step share. cos, sin: [R, D] float32."""

    slots: Tensor
    lengths: Tensor
    cos: Tensor
    sin: Tensor
    plan: DecodePlan | None


class _Step:
    """Four matrix products a layer, and in between small kernels of kernels/decode and the attention of a subclass.

    Projections become views of one matrix, and so do gate and up: new weights copied into the parameters are then seen
    here, and nothing is held twice.

    Args:
        policy: on the device it will run on, in the dtype it will run in.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.layers: list[_Layer] = []
        layer: Any
        for layer in policy.model.layers:
            weight, bias = self._project(layer.self_attn)
            self.layers.append(_Layer(layer, weight, bias, _joined([layer.mlp.gate_proj, layer.mlp.up_proj], "weight")))

    def __call__(self, cache: PolicyCache, slots: Tensor, tokens: Tensor) -> Tensor:
        model, now = self.policy.model, self._begin(cache, slots)
        x = model.embed_tokens(tokens)
        delta = None
        for joined, store in zip(self.layers, cache.layers, strict=True):
            layer = joined.layer
            before, after = layer.input_layernorm, layer.post_attention_layernorm
            normed = decode.add_rms_norm(x, delta, before.weight, before.eps)
            projected = F.linear(normed, joined.weight, joined.bias)
            out = self._attend(layer.self_attn, projected, store, now)
            delta = layer.self_attn.o_proj(out.flatten(1))
            normed = decode.add_rms_norm(x, delta, after.weight, after.eps)
            delta = layer.mlp.down_proj(decode.silu_mul(F.linear(normed, joined.both)))
        return self.policy.lm_head(decode.add_rms_norm(x, delta, model.norm.weight, model.norm.eps))

    def _norms(self, attention: Any) -> tuple[Tensor, Tensor, float] | None:
        if not self.policy.config.qk_norm:
            return None
        return attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps

    def _project(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        """Joined weight and bias of what the attention projects from the layer's input."""
        raise NotImplementedError

    def _begin(self, cache: PolicyCache, slots: Tensor) -> _Now:
        raise NotImplementedError

    def _attend(self, attention: Any, projected: Tensor, store: Any, now: _Now) -> Tensor:
        """[R, columns of the joined weight] -> [R, Hq, D]; keys and values go into the store."""
        raise NotImplementedError


class DenseStep(_Step):
    """Full attention: four matrix products and five small kernels a layer (six for a few rows, see decode_attention)."""

    def _project(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        bias = _joined(projections, "bias") if self.policy.config.qkv_bias else None
        return _joined(projections, "weight"), bias

    def _begin(self, cache: PolicyCache, slots: Tensor) -> _Now:
        return _Now(slots, cache.lengths, *_angles(self.policy, cache.lengths[slots]), None)

    def _attend(self, attention: Any, projected: Tensor, store: Any, now: _Now) -> Tensor:
        q = decode.rotate_and_append(
            projected, now.cos, now.sin, store.k, store.v, now.slots, now.lengths, attention.heads,
            self._norms(attention),
        )  # fmt: skip
        return decode.decode_attention(q, store.k, store.v, now.slots, now.lengths, attention.dim**-0.5)


class SparseStep(_Step):
    """Native Sparse Attention: four matrix products, four small kernels and the four of decode_step a layer (five where
    phi is an mlp), with a plan that any lengths fit.

    On CUDA the kernels of kernels/nsa/triton_backend/decode.py read lengths on the device. The PyTorch definition asks
    which rows complete a compression block, so on a CPU only the kernels (in Triton's interpreter) are of fixed shape.
    """

    def _project(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj]
        # The gates have a bias whether the others do or not.
        return _joined(projections, "weight", ROWS_MULTIPLE), _joined(projections, "bias", ROWS_MULTIPLE)

    def _begin(self, cache: PolicyCache, slots: Tensor) -> _Now:
        plan = cache.fixed_plan(slots)
        return _Now(slots, cache.lengths, *_angles(self.policy, plan.position), plan)

    def _attend(self, attention: Any, projected: Tensor, store: Any, now: _Now) -> Tensor:
        q, (cmp, slc, win), gates = decode.rotate_and_gate(
            projected, now.cos, now.sin, attention.heads, attention.kv_heads, self._norms(attention)
        )
        assert now.plan is not None
        out = decode_step(q, cmp, slc, win, gates, store, now.plan, attention.phi(q.dtype))
        assert isinstance(out, Tensor)
        return out


def _angles(policy: Policy, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [R, D] float32."""
    cos, sin = policy.model.rope(positions, torch.float32)
    return cos.squeeze(1), sin.squeeze(1)


def _joined(linears: list[nn.Linear], name: str, multiple: int = 1) -> Tensor:
    """One tensor with all of theirs below each other; each parameter becomes a view of its part.

    Rows are zero where a linear has no such parameter, and at the end, up to a multiple of `multiple`.
    """
    sizes = [linear.out_features for linear in linears]
    total = -(-sum(sizes) // multiple) * multiple
    shape = (total, linears[0].in_features) if name == "weight" else (total,)
    whole = linears[0].weight.data.new_zeros(shape)
    for linear, view in zip(linears, whole[: sum(sizes)].split(sizes), strict=True):
        part = getattr(linear, name)
        if part is not None:
            view.copy_(part.data)
            part.data = view
    return whole
