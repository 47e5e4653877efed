"""Adaptation: a converted policy learns to use sparse attention on long text.

Stage 1 teaches each layer by itself to do what exact attention does (`layerwise`). Stage 2 trains gates and phi with
everything else frozen, stage 3 trains all; both minimise the divergence from the dense policy's next-token distributions
(`distil`) plus an alignment loss. No gradient flows through the choice of blocks (arXiv 2502.11089), so the former alone
teaches phi to summarise but not to rank; the alignment loss keeps the ranking with the queries as they drift.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbline.models.attention import Seen, SparseAttention, open_gate_bias
from plumbline.models.distil import dense_policy, divergence_from, plant_repeats, sum_over_rows
from plumbline.models.layerwise import (
    Student,
    divergence,
    free_blocks,
    layerwise_step,
    mass_and_importance,
)
from plumbline.models.policy import Policy

# That stage 1 takes in one pass. Its backward ends with each layer, so that it holds little, and what it costs is launches.
MICROBATCHES_A_LAYER = 4
# Steps in which the rate rises, however short a stage: Adam's first ones are as long as the rate in every weight.
LEAST_WARMUP = 10


@dataclass(frozen=True)
class Recipe:
    """Settings of an adaptation.

    Attributes:
        context: tokens of a training window.
        tokens_per_step: of an optimizer step, a multiple of context.
        tokens_per_microbatch: of one forward and backward pass, a multiple of context. Stage 1 takes four at once.
        layer_steps, gate_steps, all_steps: optimizer steps of the three stages. The first is for fresh conversions: a
            policy whose gates have been trained is no longer the dense one with tokens left out, and skips it.
        layer_queries: positions a window at which stage 1 compares a layer with the dense one.
        repeat_share, repeat_length: of a window, and of a passage in it, that repeats an earlier one (`plant_repeats`).
            Half of the compared positions are in such passages.
        gate_share: gates start at (s, 1 - 2 s, s): their sum stays 1.
        new_learning_rate: of gates and phi in stage 2; a third of it in stage 3.
        learning_rate: of everything else in stage 3; None: `default_rate`. Stage 1 has rates of its own (`layerwise`).
        alignment: factor of the alignment loss in stages 2 and 3; 0 leaves it out.
        alignment_queries: positions a window at which exact and compressed scores are compared.
        warmup: share of a stage in which the learning rate rises, ten steps at least; it then falls along a cosine to a tenth.
        max_norm: of the gradient.
        minutes: all stages together end after this time, shared out by their steps, the learning rate lowered accordingly.
        seed: order of the windows, and the compared positions.
    """

    context: int = 8192
    tokens_per_step: int = 32_768
    tokens_per_microbatch: int = 16_384
    layer_steps: int = 70
    gate_steps: int = 10
    all_steps: int = 370
    layer_queries: int = 128
    repeat_share: float = 0.35
    repeat_length: int = 32
    gate_share: float = 0.01
    new_learning_rate: float = 1e-3
    learning_rate: float | None = None
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
        if not 0 <= self.repeat_share < 1:
            raise ValueError(f"repeat_share must be at least 0 and below 1, got {self.repeat_share}")
        if self.repeat_length < 2:
            raise ValueError(f"repeat_length must be at least 2, got {self.repeat_length}")


def default_rate(hidden_size: int) -> float:
    """1e-3 up to a width of 576 (SmolLM2-135M, the one measured), beyond falling with the width as Adam's rates of hidden
    matrices do (arXiv 2203.03466)."""
    return 1e-3 * min(1.0, 576 / hidden_size)


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


def alignment_loss(layer: SparseAttention, seen: Seen, positions: Tensor) -> Tensor:
    """How far the compressed scores of selection blocks are from exact attention's, weighted as in `layerwise`.

    Only phi and the compressed branch's keys get a gradient, nothing that other branches or layers read.

    Args:
        seen: of sequences of one length.
        positions: [m] int64, the queries compared, the same in each sequence.

    Returns:
        KL divergence (nats) of the two distributions over the blocks that are not always chosen, a scalar: the mean
        over sequences, kv heads and those positions that have two such blocks or more.
    """
    k_cmp = layer.branch_keys(seen.x.detach(), seen.cos, seen.sin, 0)
    with torch.autocast(seen.x.device.type, enabled=False):
        q, k_slc, v_slc = (part.detach() for part in (seen.q, seen.k_slc, seen.v_slc))
        mass, importance = mass_and_importance(q, k_cmp, k_slc, layer, seen.layout, positions, v_slc)
        return divergence(importance, mass, free_blocks(positions, mass.shape[-1], layer.nsa))


@contextmanager
def observed(policy: Policy, watch: Callable[[SparseAttention, Seen], None]) -> Iterator[None]:
    """Calls watch in every sparse layer's forward pass."""
    layers = sparse_layers(policy)
    for layer in layers:
        layer.observer = watch
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def check_teacher(teacher: Policy, policy: Policy) -> None:
    """ValueError unless the policy can learn from this one: full attention, the same tokens."""
    if teacher.config.attention != "full":
        raise ValueError(f"a teacher has full attention, this one has {teacher.config.attention}")
    if teacher.config.vocab_size != policy.config.vocab_size:
        raise ValueError(f"the teacher has {teacher.config.vocab_size} tokens, the policy {policy.config.vocab_size}")


def _next_token_loss(policy: Policy, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(policy.lm_head(rows).float(), wanted, reduction="sum")

    return sum_over_rows(part, hidden, targets)


def batches(windows: Tensor, per_step: int, seed: int) -> Iterator[Tensor]:
    """Windows [N, L] in shuffled order, per_step rows at a time, for ever; each is seen once before any is seen twice.

    Each time round, the text is cut at other places, so that no position sees the same token again.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, windows.shape[1], dtype=windows.dtype)
    shift = 0
    while True:
        while len(waiting) < per_step:
            cut = windows.flatten().roll(-shift).view_as(windows)
            waiting = torch.cat([waiting, cut[torch.randperm(len(windows), generator=generator)]])
            shift = int(torch.randint(windows.shape[1], (), generator=generator))
        rows, waiting = waiting[:per_step], waiting[per_step:]
        yield rows


def adapt(
    policy: Policy,
    windows: Tensor,
    recipe: Recipe,
    report: Callable[[dict[str, float]], None] = lambda _: None,
    *,
    teacher: Policy | None = None,
) -> None:
    """Train a sparse policy in place.

    Args:
        policy: float32, with NSA attention; on CUDA matrix products run in bfloat16.
        windows: [N, context] int64 token ids.
        recipe: settings.
        report: called after each optimizer step with its figures.
        teacher: the dense policy of stages 2 and 3, with the same tokens. None: a fresh conversion learns from the dense
            policy it was made of, one whose gates have been trained from the text, without repeats.

    Raises:
        ValueError: a dense policy, a sparse teacher or one with other tokens, windows of another length, or a loss that is
            not finite.
    """
    if policy.config.attention != "nsa":
        raise ValueError("adaptation needs a policy with nsa attention; convert it first")
    if windows.shape[1] != recipe.context:
        raise ValueError(f"windows have {windows.shape[1]} tokens, the recipe says {recipe.context}")
    if teacher is not None:
        check_teacher(teacher, policy)
    fresh = open_gates(policy, recipe.gate_share)
    if teacher is None and fresh and recipe.gate_steps + recipe.all_steps:
        teacher = dense_policy(policy)
    generator = torch.Generator().manual_seed(recipe.seed)
    stream = batches(windows, recipe.tokens_per_step // recipe.context, recipe.seed)
    start = time.monotonic()
    policy.train()
    counts = [recipe.layer_steps if fresh else 0, recipe.gate_steps, recipe.all_steps]
    stages = [_layer_stage, _gate_stage, _whole_stage]
    for number, (steps, stage) in enumerate(zip(counts, stages, strict=True), 1):
        if not steps:
            continue
        policy.requires_grad_(False)
        groups, run = stage(policy, recipe, teacher)
        # The text itself, where it is what is learnt from.
        share = recipe.repeat_share if number == 1 or teacher is not None else 0.0
        for group in groups:
            group["peak"] = group["lr"]
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        begun = time.monotonic()
        seconds = None if recipe.minutes is None else recipe.minutes * 60 * steps / sum(counts)
        for step in range(steps):
            # Whichever of the steps and the clock is further along decides.
            done = step / steps
            if seconds is not None:
                done = max(done, (time.monotonic() - begun) / seconds)
            if done >= 1:
                break
            risen = min(1.0, (done + 1 / steps) / recipe.warmup, (step + 1) / LEAST_WARMUP)
            rate = risen * (0.55 + 0.45 * math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad(set_to_none=True)
            figures = run(*plant_repeats(next(stream), share, recipe.repeat_length, generator))
            optimizer.step()
            report({"stage": number, "step": step + 1, "rate": rate, **figures, "seconds": time.monotonic() - start})
    policy.requires_grad_(True)
    policy.eval()


Groups = list[dict[str, Any]]
Run = Callable[[Tensor, Tensor], dict[str, float]]  # of windows, and the positions in them that repeat


def _layer_stage(policy: Policy, recipe: Recipe, _: Policy | None) -> tuple[Groups, Run]:
    students = [Student(layer) for layer in sparse_layers(policy)]
    # Layers share their rates: one group a rate, so that an optimizer step takes few launches.
    groups = [
        {"params": [p for group in same for p in group["params"]], "lr": same[0]["lr"]}
        for same in zip(*(student.groups() for student in students), strict=True)
    ]
    return groups, lambda rows, repeated: _layer_step(policy, students, rows, repeated, recipe)


def _gate_stage(policy: Policy, recipe: Recipe, teacher: Policy | None) -> tuple[Groups, Run]:
    new = [p for name, p in policy.named_parameters() if is_new(name)]
    groups = [{"params": new, "lr": recipe.new_learning_rate}]
    return groups, lambda rows, repeated: _step(policy, teacher, rows, repeated, recipe)


def _whole_stage(policy: Policy, recipe: Recipe, teacher: Policy | None) -> tuple[Groups, Run]:
    new = [p for name, p in policy.named_parameters() if is_new(name)]
    rest = [p for name, p in policy.named_parameters() if not is_new(name)]
    rate = default_rate(policy.config.hidden_size) if recipe.learning_rate is None else recipe.learning_rate
    groups = [{"params": new, "lr": recipe.new_learning_rate / 3}, {"params": rest, "lr": rate}]
    return groups, lambda rows, repeated: _step(policy, teacher, rows, repeated, recipe)


def is_new(name: str) -> bool:
    """Whether the parameter is one that conversion adds, a gate or phi."""
    return ".phi_" in name or (".gate_proj." in name and ".self_attn." in name)


def _positions(recipe: Recipe, count: int, repeated: Tensor, device: torch.device) -> Tensor:
    """Positions to compare at, half of them among the repeated ones. New for each pass; the same in each window of it."""
    there = repeated[torch.randint(len(repeated), (count // 2,))] if len(repeated) else repeated
    anywhere = torch.randint(recipe.context, (count - len(there),))
    return torch.cat([there, anywhere]).sort().values.to(device)


def _layer_step(
    policy: Policy, students: list[Student], rows: Tensor, repeated: Tensor, recipe: Recipe
) -> dict[str, float]:
    device = policy.device
    total = torch.zeros(2, device=device)
    for micro in rows.split(MICROBATCHES_A_LAYER * recipe.tokens_per_microbatch // recipe.context):
        ids, share = micro.to(device), len(micro) / len(rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            positions = _positions(recipe, recipe.layer_queries, repeated, device)
            total += share * layerwise_step(policy, students, ids, positions, share)
    aligned, error = total.tolist()
    if not math.isfinite(aligned + error):
        raise ValueError(f"a layer's loss is not finite (alignment {aligned:.4g}, output error {error:.4g})")
    return {"alignment": aligned, "output_error": error, "tokens": rows.numel()}


def _step(policy: Policy, teacher: Policy | None, rows: Tensor, repeated: Tensor, recipe: Recipe) -> dict[str, float]:
    device = policy.device
    per_pass = recipe.tokens_per_microbatch // recipe.context
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    layers = len(sparse_layers(policy))
    total = torch.zeros(2, device=device)
    for micro in rows.split(per_pass):
        ids = micro.to(device)
        ends = torch.arange(len(ids) + 1, dtype=torch.int32, device=device) * recipe.context
        positions = _positions(recipe, recipe.alignment_queries, repeated, device)
        parts: list[Tensor] = []

        def watch(
            layer: SparseAttention, seen: Seen, positions: Tensor = positions, parts: list[Tensor] = parts
        ) -> None:
            parts.append(alignment_loss(layer, seen, positions))

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if recipe.alignment:
                with observed(policy, watch):
                    hidden = policy.hidden_states(ids.flatten(), ends)
            else:
                hidden = policy.hidden_states(ids.flatten(), ends)
            keep = hidden.view(*ids.shape, -1)[:, :-1].flatten(0, 1)
            if teacher is None:
                loss = _next_token_loss(policy, keep, ids[:, 1:].flatten()) / tokens
            else:
                with torch.no_grad():
                    wanted = teacher.hidden_states(ids.flatten(), ends).view(*ids.shape, -1)[:, :-1].flatten(0, 1)
                loss = divergence_from(teacher, policy, wanted, keep) / tokens
        aligned = torch.stack(parts).sum() / layers * (len(ids) / len(rows)) if parts else loss.new_zeros(())
        (loss + recipe.alignment * aligned).backward()
        total += torch.stack([loss.detach(), aligned.detach()])
    norm = nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], recipe.max_norm)
    if not bool(torch.isfinite(norm)):
        raise ValueError(f"the gradient is not finite (loss {total[0].item():.4g}); lower the learning rates")
    name = "loss" if teacher is None else "divergence"
    return {name: total[0].item(), "alignment": total[1].item(), "gradient_norm": norm.item(), "tokens": tokens}


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
