"""Layer by layer: sparse attention learns to choose, and to give, what exact attention does.

Each layer of a freshly converted policy reads what the dense policy would feed it, so layers learn independently of each
other, no gradient passes through the model, and a few queries of each window suffice. Two losses (`layer_losses`):

- alignment, which teaches the compressed keys to rank blocks: KL divergence from the mass that exact attention gives the
  selection blocks, times the length of its values, to the importance that NSA ranks them by (the warm-up of DeepSeek-V3.2's indexer, arXiv 2512.02556;
  SeerAttention's gate, arXiv 2410.13276). By mass alone, blocks with attention sinks, whose values are near
  zero, would push out those that the output depends on;
- output error, which teaches gates, keys and values to make up for the tokens that are left out: a softmax over part of
  the tokens gives these too much weight, most of all where attention sinks are among those left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.kernels.nsa import Layout, NSAConfig
from plumbline.kernels.nsa.config import key_position, overlap_weights
from plumbline.kernels.nsa.reference import block_mask, choose, compress_padded, compressed_probabilities
from plumbline.models.attention import SparseAttention
from plumbline.models.policy import Policy
from plumbline.models.rope import rotate

# Peak rates of Adam. Alone, the compressed keys learn fastest at 3e-3 to 1e-2; at 1e-3 or more phi, which sums over a whole
# block, overfits, and so do the other branches.
RANKING_RATE = 5e-3
PHI_RATE = 5e-4
MIXING_RATE = 3e-4
GATE_RATE = 2e-2


def block_mass(probabilities: Tensor, size: int) -> Tensor:
    """Attention [B, Hkv, G, m, L] -> mass of selection blocks, summed over the group, [B, Hkv, m, S]."""
    length = probabilities.shape[-1]
    blocks = -(-length // size)
    return F.pad(probabilities.sum(2), (0, blocks * size - length)).unflatten(-1, (blocks, size)).sum(-1)


def free_blocks(positions: Tensor, blocks: int, config: NSAConfig) -> Tensor:
    """[m, blocks] bool: blocks that a query may choose or not, neither forced nor in its future."""
    j = torch.arange(blocks, device=positions.device)
    return (j >= config.initial) & (j <= (positions // config.select_block)[:, None] - config.local)


def divergence(importance: Tensor, mass: Tensor, free: Tensor) -> Tensor:
    """KL divergence (nats) from mass to importance, both [B, Hkv, m, S], over the free blocks [m, S].

    Returns:
        The mean over sequences, kv heads and those queries that have two free blocks or more; a scalar, 0 without any.
    """
    rows = free.sum(-1) > 1
    if not bool(rows.any()):
        return importance.sum() * 0
    target, score = mass[..., rows, :] * free[rows], importance[..., rows, :].clamp(min=1e-9) * free[rows]
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
    log_score = torch.log(score.clamp(min=1e-9) / score.sum(-1, keepdim=True))
    return (torch.xlogy(target, target) - target * log_score).sum(-1).mean()


def scaled_queries(q: Tensor, layer: SparseAttention, positions: Tensor) -> Tensor:
    """q [B, Hq, L, D] at the positions [m], times the scale of the logits: [B, Hkv, G, m, D] float32."""
    scale = layer.nsa.scale if layer.nsa.scale is not None else 1 / math.sqrt(layer.dim)
    return q[:, :, positions].float().unflatten(1, (layer.kv_heads, -1)) * scale


def exact_mass(logits: Tensor, positions: Tensor, size: int, values: Tensor | None = None) -> Tensor:
    """Mass that exact attention gives to selection blocks, each token's times the length of its value if values are given.

    Args:
        logits: [B, Hkv, G, m, L]; values: [B, Hkv, L, Dv].

    Returns:
        [B, Hkv, m, S], no gradient.
    """
    with torch.no_grad():
        seen = torch.arange(logits.shape[-1], device=logits.device) <= positions[:, None]
        p = torch.softmax(logits.masked_fill(~seen, -math.inf), -1)
        return block_mass(p if values is None else p * values.norm(dim=-1)[:, :, None, None], size)


def rank(q: Tensor, k_cmp: Tensor, layer: SparseAttention, positions: Tensor) -> tuple[Tensor, Tensor]:
    """What NSA ranks selection blocks by.

    Args:
        q: of scaled_queries; k_cmp: [B, Hkv, L, D] float32.

    Returns:
        Attention to compressed blocks [B, Hkv, G, m, N], importance of selection blocks [B, Hkv, m, S].
    """
    config = layer.nsa
    place = key_position(layer.phi_k_position, config)
    k_blocks = compress_padded(k_cmp, layer.phi_k_weight, place, config.block, config.stride, config.phi)
    ends = torch.arange(k_blocks.shape[2], device=q.device) * config.stride + config.block - 1
    p = compressed_probabilities(q @ k_blocks[:, :, None].transpose(-1, -2), ends <= positions[:, None])
    blocks = -(-k_cmp.shape[2] // config.select_block)
    return p, p.sum(2) @ overlap_weights(len(ends), blocks, config.block, config.stride, config.select_block, p)


def mass_and_importance(
    q: Tensor, k_cmp: Tensor, k_slc: Tensor, layer: SparseAttention, layout: Layout, positions: Tensor,
    v_slc: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """exact_mass over the selected branch's keys, and the importance of `rank`, both [B, Hkv, m, S].

    Args:
        q: [T, Hq, D]; k_cmp, k_slc: [T, Hkv, D], rotated; v_slc: [T, Hkv, Dv], see exact_mass.
        layout: of sequences of one length.
        positions: [m] int64, of the queries, the same in each sequence.
    """
    query = scaled_queries(layout.pad(q), layer, positions)
    keys, raw = (layout.pad(k).float() for k in (k_slc, k_cmp))
    values = None if v_slc is None else layout.pad(v_slc).float()
    mass = exact_mass(query @ keys[:, :, None].transpose(-1, -2), positions, layer.nsa.select_block, values)
    return mass, rank(query, raw, layer, positions)[1]


def chosen_blocks(importance: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """Importance [B, Hkv, m, S] -> [B, Hkv, m, S] bool, no gradient."""
    with torch.no_grad():
        numbers = choose(importance, positions, config.select_block, config.count, config.initial, config.local)
        return block_mask(numbers, importance.shape[-1])


def _attend(logits: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """Softmax over what is seen. logits [B, Hkv, G, m, L], seen broadcastable to it, v [B, Hkv, L, Dv]."""
    return torch.softmax(logits.masked_fill(~seen, -math.inf), -1) @ v[:, :, None]


Branch = tuple[Tensor, Tensor]


def sparse_at(
    q: Tensor, cmp: Branch, slc: Branch, win: Branch, gates: Tensor, positions: Tensor, layer: SparseAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """Native Sparse Attention at some queries only, written out in float32.

    Args:
        q: of scaled_queries; gates: [B, Hkv, G, m, 3].
        cmp, slc, win: keys and values [B, Hkv, L, D] of whole windows.
        positions: [m] int64, of the queries, the same in each window.

    Returns:
        out [B, Hkv, G, m, Dv]; importance [B, Hkv, m, S]; mass [B, Hkv, m, S] of exact attention over slc, times the
        length of its values.
    """
    config = layer.nsa
    token, at = torch.arange(slc[0].shape[2], device=q.device), positions[:, None]
    p, importance = rank(q, cmp[0], layer, positions)
    v_blocks = compress_padded(
        cmp[1], layer.phi_v_weight, layer.phi_v_position, config.block, config.stride, config.phi
    )
    logits = q @ slc[0][:, :, None].transpose(-1, -2)
    mass = exact_mass(logits, positions, config.select_block, slc[1])
    tokens = chosen_blocks(importance, positions, config).repeat_interleave(config.select_block, -1)[..., : len(token)]
    selected = _attend(logits, (tokens & (token <= at))[:, :, None], slc[1])
    near = (token <= at) & (token > at - config.window)
    window = _attend(q @ win[0][:, :, None].transpose(-1, -2), near, win[1])
    branches = torch.stack([p @ v_blocks[:, :, None], selected, window], -1)
    return (branches * gates[..., None, :]).sum(-1), importance, mass


class Student:
    """What this stage trains of a layer: gates, phi, and the projections of keys and values, the latter as one tensor a
    branch that shares the layer's memory, since branches learn at different rates. Queries and the rest stay.
    """

    def __init__(self, layer: SparseAttention) -> None:
        self.layer = layer
        rows = layer.kv_heads * layer.dim
        self.k, self.v = (
            [nn.Parameter(part) for part in linear.weight.data.split(rows)] for linear in (layer.k_proj, layer.v_proj)
        )
        # The dense model's keys and values: the selected branch starts as a copy of them.
        self.exact = (self.k[1].detach().clone(), self.v[1].detach().clone())

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups with their peak rates, the same four in each layer."""
        layer = self.layer
        rated: list[tuple[list[Tensor], float]] = [
            ([self.k[0]], RANKING_RATE),
            ([layer.phi_k_weight, layer.phi_k_position, layer.phi_v_weight, layer.phi_v_position], PHI_RATE),
            ([*self.k[1:], *self.v, layer.gate_proj.weight], MIXING_RATE),
            ([layer.gate_proj.bias], GATE_RATE),
        ]
        return [{"params": members, "lr": rate} for members, rate in rated]

    def branch(self, x: Tensor, cos: Tensor, sin: Tensor, number: int, weights: Branch) -> Branch:
        """Rotated keys and values [T, Hkv, D] of x [T, hidden], with these weights and the biases of a branch."""
        layer, (k_weight, v_weight) = self.layer, weights
        bias = None if layer.v_proj.bias is None else layer.v_proj.bias.chunk(3)[number]
        v = F.linear(x, v_weight, bias).unflatten(-1, (-1, layer.dim))
        return layer.branch_keys(x, cos, sin, number, k_weight), v

    @torch.no_grad()
    def exact_attention(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The dense layer: queries [B, Hq, L, D], and what it adds to the residual stream [T, hidden]."""
        layer = self.layer
        k, v = self.branch(x, cos, sin, 1, self.exact)
        q = layout.pad(rotate(layer.q_norm(layer.q_proj(x).unflatten(-1, (-1, layer.dim))), cos, sin))
        out = F.scaled_dot_product_attention(
            q,
            layout.pad(k),
            layout.pad(v),
            is_causal=True,
            scale=layer.nsa.scale,
            enable_gqa=layer.heads != layer.kv_heads,
        )
        return q, layer.o_proj(layout.unpad(out).flatten(1))

    def losses(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, q: Tensor, exact: Tensor, positions: Tensor
    ) -> Tensor:
        """Alignment (nats) and output error (share of the exact output's square): [2].

        Args:
            x: [T, hidden], the layer's input, of windows of one length.
            q, exact: of exact_attention.
            positions: [m] int64, the queries looked at.
        """
        layer = self.layer
        cmp, slc, win = (
            (layout.pad(k).float(), layout.pad(v).float())
            for k, v in (
                self.branch(x, cos, sin, number, weights)
                for number, weights in enumerate(zip(self.k, self.v, strict=True))
            )
        )
        batch = (len(layout.sizes), layout.longest)
        gates = layer.gates(x.unflatten(0, batch)[:, positions]).float()  # [B, m, Hq, 3]
        gates = gates.transpose(1, 2).unflatten(1, (layer.kv_heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            query = scaled_queries(q, layer, positions)
            out, importance, mass = sparse_at(query, cmp, slc, win, gates, positions, layer)
            aligned = divergence(importance, mass, free_blocks(positions, mass.shape[-1], layer.nsa))
        out = layer.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2).to(x.dtype)).float()
        wanted = exact.unflatten(0, batch)[:, positions].float()
        wrong, whole = ((x.square().sum((1, 2))) for x in (out - wanted, wanted))
        return torch.stack([aligned, (wrong / whole.clamp(min=1e-12)).mean()])


def layerwise_step(policy: Policy, students: list[Student], ids: Tensor, positions: Tensor, weight: float) -> Tensor:
    """Gradients of both losses, times weight, of all layers over windows ids [B, L].

    Returns:
        [2], the mean over layers of alignment and output error.
    """
    model = policy.model
    batch, length = ids.shape
    layout = Layout(torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * length)
    total = torch.zeros(2, device=ids.device)
    with torch.no_grad():
        x = model.embed_tokens(ids.flatten())
        cos, sin = model.rope(
            torch.arange(length, device=ids.device).repeat(batch), x.dtype, layout.lengths.repeat_interleave(length)
        )
    layer: Any
    for layer, student in zip(model.layers, students, strict=True):
        with torch.no_grad():
            inputs = layer.input_layernorm(x)
            q, exact = student.exact_attention(inputs, cos, sin, layout)
        losses = student.losses(inputs, cos, sin, layout, q, exact, positions)
        (losses.sum() * weight).backward()
        total += losses.detach() / len(students)
        with torch.no_grad():
            x = x + exact
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return total
