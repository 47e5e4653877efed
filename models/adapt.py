"""Adaptation: a converted policy learns to use its gates and its compression map on long text.

Stage 1 trains gates and phi with everything else frozen, stage 2 trains all. Both minimise the next-token loss plus an
alignment loss. No gradient flows through the choice of blocks (arXiv 2502.11089), so the next-token loss alone teaches
phi to summarise but not to rank; the alignment loss does that: the blocks' compressed scores are drawn to the mass that
exact attention gives the same blocks (the warm-up of DeepSeek-V3.2's indexer, arXiv 2512.02556, does the same).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbline.kernels.nsa import Layout, NSAConfig
from plumbline.kernels.nsa.config import overlap_weights
from plumbline.kernels.nsa.reference import compress_padded, compressed_logits, compressed_probabilities
from plumbline.models.attention import SparseAttention, open_gate_bias
from plumbline.models.policy import Policy

LOGIT_ROWS = 4096


@dataclass(frozen=True)
class Recipe:
    """Settings of an adaptation.

    Attributes:
        context: tokens of a training window.
        tokens_per_step: of an optimizer step, a multiple of context.
        tokens_per_microbatch: of one forward and backward pass, a multiple of context.
        gate_steps, all_steps: optimizer steps of the two stages.
        gate_share: gates start at (s, 1 - 2 s, s): their sum stays 1.
        new_learning_rate: of gates and phi in stage 1; a third of it in stage 2.
        learning_rate: of everything else in stage 2.
        alignment: factor of the alignment loss; 0 leaves it out.
        alignment_queries: positions a window at which exact and compressed scores are compared.
        warmup: share of a stage in which the learning rate rises; it then falls along a cosine to a tenth.
        max_norm: of the gradient.
        minutes: both stages together end after this time at the latest, the learning rate lowered accordingly.
        seed: order of the windows, and the compared positions.
    """

    context: int = 8192
    tokens_per_step: int = 65_536
    tokens_per_microbatch: int = 16_384
    gate_steps: int = 50
    all_steps: int = 200
    gate_share: float = 0.05
    new_learning_rate: float = 1e-3
    learning_rate: float = 5e-5
    alignment: float = 0.5
    alignment_queries: int = 128
    warmup: float = 0.1
    max_norm: float = 1.0
    minutes: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "tokens_per_microbatch"):
            if getattr(self, name) < self.context or getattr(self, name) % self.context:
                raise ValueError(f"{name} ({getattr(self, name)}) must be a multiple of context ({self.context})")
        if not 0 < self.gate_share < 0.5:
            raise ValueError(f"gate_share must be between 0 and 0.5, got {self.gate_share}")


def sparse_layers(policy: Policy) -> list[SparseAttention]:
    return [module for module in policy.modules() if isinstance(module, SparseAttention)]


@torch.no_grad()
def open_gates(policy: Policy, share: float) -> bool:
    """Gates of a freshly converted policy from (0, 1, 0) to (share, 1 - 2 share, share).

    At (0, 1, 0) the sigmoid is flat and no gradient moves it. Returns False, and changes nothing, where the gates have
    been trained already.
    """
    layers = sparse_layers(policy)
    for layer in layers:
        closed = open_gate_bias(layer.heads).to(layer.gate_proj.bias)
        if layer.gate_proj.weight.any() or not torch.allclose(layer.gate_proj.bias, closed, rtol=0.01):
            return False
    shares = torch.tensor([share, 1 - 2 * share, share])
    for layer in layers:
        layer.gate_proj.bias.copy_(torch.logit(shares).repeat(layer.heads))
    return True


def alignment_loss(
    q: Tensor, k_cmp: Tensor, k_slc: Tensor, layer: SparseAttention, layout: Layout, positions: Tensor
) -> Tensor:
    """How far the compressed scores of selection blocks are from exact attention's.

    Args:
        q: [T, Hq, D]; k_cmp, k_slc: [T, Hkv, D], rotated. Only phi gets a gradient.
        layout: of sequences of one length.
        positions: [m] int64, the queries compared, the same in each sequence.

    Returns:
        KL divergence (nats) of the two distributions over the blocks that are not always chosen, a scalar: the mean
        over sequences, kv heads and those positions that have two such blocks or more.
    """
    config: NSAConfig = layer.nsa
    scale = config.scale if config.scale is not None else 1 / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        query = layout.pad(q.detach())[:, :, positions].float()
        keys = layout.pad(k_slc.detach()).float()
        raw = layout.pad(k_cmp.detach()).float()
        size, length = config.select_block, layout.longest
        count = -(-length // size)
        j = torch.arange(count, device=q.device)
        own = (positions // size)[:, None]
        free = (j >= config.initial) & (j <= own - config.local)  # [m, S]
        rows = free.sum(-1) > 1
        if not bool(rows.any()):
            return query.new_zeros(())

        with torch.no_grad():
            seen = torch.arange(length, device=q.device) <= positions[:, None]
            exact = torch.softmax(compressed_logits(query, keys, scale).masked_fill(~seen, -math.inf), -1).sum(2)
            exact = F.pad(exact, (0, count * size - length)).unflatten(-1, (count, size)).sum(-1)
        k_blocks = compress_padded(
            raw, layer.phi_k_weight, layer.phi_k_position, config.block, config.stride, config.phi
        )
        ends = torch.arange(k_blocks.shape[2], device=q.device) * config.stride + config.block - 1
        p = compressed_probabilities(compressed_logits(query, k_blocks, scale), ends <= positions[:, None]).sum(2)
        weights = overlap_weights(k_blocks.shape[2], count, config.block, config.stride, size, p)

        target = exact[..., rows, :] * free[rows]
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-9)
        score = ((p @ weights)[..., rows, :] * free[rows]).clamp(min=1e-9)
        score = torch.where(free[rows], score, torch.zeros_like(score))
        log_score = torch.log(score.clamp(min=1e-9) / score.sum(-1, keepdim=True))
        return (torch.xlogy(target, target) - target * log_score).sum(-1).mean()


@contextmanager
def observed(
    policy: Policy, watch: Callable[[SparseAttention, Tensor, Tensor, Tensor, Layout], None]
) -> Iterator[None]:
    """Calls watch(layer, q, k_cmp, k_slc, layout) in every sparse layer's forward pass."""
    layers = sparse_layers(policy)
    for layer in layers:
        layer.observer = watch
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def _next_token_loss(policy: Policy, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens; logits are made again in the backward pass, a few rows at a time."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(policy.lm_head(rows).float(), wanted, reduction="sum")

    parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return torch.stack([checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in parts]).sum()


def batches(windows: Tensor, per_step: int, seed: int) -> Iterator[Tensor]:
    """Windows [N, L] in shuffled order, per_step rows at a time, for ever; each is seen once before any is seen twice."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < per_step:
            waiting += torch.randperm(len(windows), generator=generator).tolist()
        rows, waiting = waiting[:per_step], waiting[per_step:]
        yield windows[rows]


def adapt(
    policy: Policy, windows: Tensor, recipe: Recipe, report: Callable[[dict[str, float]], None] = lambda _: None
) -> None:
    """Train a sparse policy in place.

    Args:
        policy: float32, with NSA attention; on CUDA matrix products run in bfloat16.
        windows: [N, context] int64 token ids.
        recipe: settings.
        report: called after each optimizer step with its figures.

    Raises:
        ValueError: a dense policy, windows of another length, or a loss that is not finite.
    """
    if policy.config.attention != "nsa":
        raise ValueError("adaptation needs a policy with nsa attention; convert it first")
    if windows.shape[1] != recipe.context:
        raise ValueError(f"windows have {windows.shape[1]} tokens, the recipe says {recipe.context}")
    open_gates(policy, recipe.gate_share)
    new = [p for n, p in policy.named_parameters() if (".gate_proj." in n and ".self_attn." in n) or ".phi_" in n]
    rest = [p for p in policy.parameters() if all(p is not other for other in new)]
    stream = batches(windows, recipe.tokens_per_step // recipe.context, recipe.seed)
    start = time.monotonic()
    policy.train()
    whole = recipe.gate_steps + recipe.all_steps
    stages = [
        (1, recipe.gate_steps, [(new, recipe.new_learning_rate)]),
        (2, recipe.all_steps, [(new, recipe.new_learning_rate / 3), (rest, recipe.learning_rate)]),
    ]
    for number, steps, groups in stages:
        for parameter in rest:
            parameter.requires_grad_(number == 2)
        optimizer = torch.optim.AdamW(
            [{"params": members, "lr": rate, "peak": rate} for members, rate in groups],
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        begun = time.monotonic()
        seconds = None if recipe.minutes is None else recipe.minutes * 60 * steps / whole
        for step in range(steps):
            # Whichever of the steps and the clock is further along decides.
            done = step / steps
            if seconds is not None:
                done = max(done, (time.monotonic() - begun) / seconds)
            if done >= 1:
                break
            rate = min(1.0, (done + 1 / steps) / recipe.warmup) * (0.55 + 0.45 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            figures = _step(policy, next(stream), recipe, optimizer)
            report({"stage": number, "step": step + 1, "rate": rate, **figures, "seconds": time.monotonic() - start})
    policy.eval()


def _step(policy: Policy, rows: Tensor, recipe: Recipe, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    device = policy.device
    per_pass = recipe.tokens_per_microbatch // recipe.context
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    layers = len(sparse_layers(policy))
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(2, device=device)
    for micro in rows.split(per_pass):
        ids = micro.to(device)
        ends = torch.arange(len(ids) + 1, dtype=torch.int32, device=device) * recipe.context
        # A few positions, new ones in each pass; only those past the reach of selection say anything.
        positions = torch.randint(0, recipe.context, (recipe.alignment_queries,)).sort().values.to(device)
        parts: list[Tensor] = []

        def watch(
            layer: SparseAttention,
            q: Tensor,
            k_cmp: Tensor,
            k_slc: Tensor,
            layout: Layout,
            positions: Tensor = positions,
            parts: list[Tensor] = parts,
        ) -> None:
            parts.append(alignment_loss(q, k_cmp, k_slc, layer, layout, positions))

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if recipe.alignment:
                with observed(policy, watch):
                    hidden = policy.hidden_states(ids.flatten(), ends)
            else:
                hidden = policy.hidden_states(ids.flatten(), ends)
            keep = hidden.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
            loss = _next_token_loss(policy, keep, ids[:, 1:].flatten()) / tokens
        aligned = torch.stack(parts).sum() / layers * (len(ids) / len(rows)) if parts else loss.new_zeros(())
        (loss + recipe.alignment * aligned).backward()
        total += torch.stack([loss.detach(), aligned.detach()])
    norm = nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], recipe.max_norm)
    if not bool(torch.isfinite(norm)):
        raise ValueError(f"the gradient is not finite (loss {total[0].item():.4g}); lower the learning rates")
    optimizer.step()
    return {"loss": total[0].item(), "alignment": total[1].item(), "gradient_norm": norm.item(), "tokens": tokens}


@torch.no_grad()
def mean_gates(policy: Policy, rows: Tensor) -> Tensor:
    """Mean gates (cmp, slc, win) of each layer over some windows [N, L]: [layers, 3] float32 on the CPU."""
    found: list[Tensor] = []
    hooks = [
        layer.gate_proj.register_forward_hook(
            lambda layer, _, out: found.append(torch.sigmoid(out.float()).unflatten(-1, (-1, 3)).mean((0, 1)).cpu())
        )
        for layer in sparse_layers(policy)
    ]
    try:
        for row in rows:
            ids = row.to(policy.device)
            policy.hidden_states(ids, torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).view(len(rows), -1, 3).mean(0)
