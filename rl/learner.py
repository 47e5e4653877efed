"""The learner: turns a batch of graded completions into an optimizer step. It knows nothing of Ray."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumbline.errors import InputError
from plumbline.models.load import load_policy
from plumbline.rl.adagc import AdaptiveGradientClipper
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.config import RunConfig
from plumbline.rl.logprobs import token_logprobs
from plumbline.rl.losses import LossConfig, kl_penalty, policy_loss
from plumbline.rl.losses.policy import aggregate


class NonFiniteGradients(RuntimeError):
    """More optimizer steps in a row than allowed had a NaN or Inf gradient."""


class Learner:
    """Policy, optimizer and gradient clipping of one training run.

    Args:
        config: the run's.
        device: torch device string.
    """

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config = config
        self.device = device
        # Dropout and initialisation of new tensors (a converted checkpoint's phi) draw from the run's seed.
        torch.manual_seed(config.seed)
        self.policy = load_policy(
            config.policy.path, attention=config.policy.attention, dtype=torch.float32, device=device
        )
        self.policy.train()
        if config.learner.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable()
        self.reference = None
        if config.algorithm.kl_coefficient > 0:
            self.reference = load_policy(
                config.policy.path, attention=config.policy.attention, dtype=torch.float32, device=device
            )
            self.reference.requires_grad_(False).eval()
        settings = config.learner
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        updates = config.steps * settings.epochs * settings.minibatches
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _schedule(step, updates, config)
        )
        self.adagc: AdaptiveGradientClipper | None = None
        if settings.clipping.method == "adagc":
            clipping = settings.clipping
            self.adagc = AdaptiveGradientClipper(
                self.policy.named_parameters(),
                clipping.max_norm,
                clipping.relative,
                clipping.beta,
                clipping.warmup_steps,
            )
        self.version = 0
        self.skipped_in_a_row = 0

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        """Train on one step's batch: `epochs` passes of `minibatches` optimizer steps each. Returns mean metrics."""
        settings = self.config.learner
        totals: dict[str, list[float]] = defaultdict(list)
        groups = len(batch) // batch.group_size
        for _ in range(settings.epochs):
            for share in range(settings.minibatches):
                first, last = groups * share // settings.minibatches, groups * (share + 1) // settings.minibatches
                rows = list(range(first * batch.group_size, last * batch.group_size))
                for name, value in self._optimizer_step(batch, rows).items():
                    totals[name].append(value)
        self.version += 1
        metrics = {name: sum(values) / len(values) for name, values in totals.items()}
        metrics["learner/skipped_steps"] = sum(totals["learner/skipped_steps"])
        metrics["learner/ratio_max"] = max(totals["learner/ratio_max"])
        return metrics

    def _optimizer_step(self, batch: TrainingBatch, rows: list[int]) -> dict[str, float]:
        algorithm, settings = self.config.algorithm, self.config.learner
        tokens = sum(len(batch.completion_ids[row]) for row in rows)
        loss_config = LossConfig(
            ratio=algorithm.ratio,
            aggregation=algorithm.aggregation,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            max_length=self.config.rollout.max_new_tokens,
            normalizer=float(tokens if algorithm.aggregation == "token" else len(rows)),
        )
        if self.reference is None:
            # A completion of zero advantage has no gradient: not computing it changes nothing but the time. One row
            # stays in any case, so that a step without signal still has (zero) gradients.
            rows = [row for row in rows if batch.advantages[row] != 0] or rows[:1]
            tokens = sum(len(batch.completion_ids[row]) for row in rows)
        sums: dict[str, float] = defaultdict(float)
        self.optimizer.zero_grad(set_to_none=True)
        for micro in microbatches(batch, rows, settings.tokens_per_microbatch):
            loss, stats, share = self._forward(batch, micro, loss_config, tokens)
            loss.backward()
            sums["learner/loss"] += loss.item()
            for name, value in stats.items():
                key = f"learner/{name}"
                if name.endswith("_max"):
                    sums[key] = max(sums[key], value.item())
                else:
                    sums[key] += value.item() * share
        norm = self._clip()
        sums["learner/gradient_norm"] = norm
        sums["learner/learning_rate"] = float(self.scheduler.get_last_lr()[0])
        sums["learner/skipped_steps"] = 0.0
        if math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            sums["learner/skipped_steps"] = 1.0
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > settings.max_skipped_steps:
                raise NonFiniteGradients(
                    f"{self.skipped_in_a_row} optimizer steps in a row had a NaN or Inf gradient "
                    f"(learner.max_skipped_steps is {settings.max_skipped_steps}); lower learner.learning_rate or look at the last batch"
                )
        self.scheduler.step()
        return dict(sums)

    def _forward(
        self, batch: TrainingBatch, micro: list[int], loss_config: LossConfig, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        """Loss of one microbatch (already over the whole minibatch's denominator), its stats and its share of tokens."""
        ids, cu_seqlens, predict, targets = pack(batch, micro, self.device)
        width = max(len(batch.completion_ids[row]) for row in micro)
        lengths = torch.tensor([len(batch.completion_ids[row]) for row in micro], device=self.device)
        mask = torch.arange(width, device=self.device)[None] < lengths[:, None]
        logprobs, entropy = self._logprobs(self.policy, ids, cu_seqlens, predict, targets)
        current = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
        old = torch.zeros(mask.shape)
        for row, index in enumerate(micro):
            old[row, : len(batch.logprobs[index])] = torch.tensor(batch.logprobs[index])
        old = old.to(self.device)
        advantages = torch.tensor([batch.advantages[index] for index in micro], dtype=torch.float32, device=self.device)
        loss, stats = policy_loss(current, old, advantages, mask, loss_config)
        stats["entropy"] = entropy.mean()
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self._logprobs(self.reference, ids, cu_seqlens, predict, targets)
            reference = reference.new_zeros(mask.shape).masked_scatter(mask, reference)
            divergence = kl_penalty(current, reference, self.config.algorithm.kl_estimator)
            loss = loss + self.config.algorithm.kl_coefficient * aggregate(divergence, mask, loss_config)
            stats["kl_reference"] = (divergence.detach() * mask).sum() / mask.sum()
        return loss, stats, mask.sum().item() / tokens

    def _logprobs(
        self, policy: Any, ids: Tensor, cu_seqlens: Tensor, predict: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        half = self.config.learner.precision == "bfloat16"
        with torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=half):
            hidden = policy.hidden_states(ids, cu_seqlens)[predict]
            return token_logprobs(
                hidden,
                targets,
                policy.lm_head,
                temperature=self.config.rollout.temperature,
                chunk_tokens=self.config.learner.logprob_chunk_tokens,
            )

    def _clip(self) -> float:
        clipping = self.config.learner.clipping
        if self.adagc is not None:
            return self.adagc.clip().item()
        limit = clipping.max_norm if clipping.method == "global" else math.inf
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).item()

    def weights(self) -> dict[str, Tensor]:
        """The policy's tensors as they are, detached (a tied tensor once)."""
        return {name: parameter.detach() for name, parameter in self.policy.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the policy's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "adagc": self.adagc.state_dict() if self.adagc else None,
            "version": self.version,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rng": torch.get_rng_state(),
        }

    def load(self, folder: Path) -> None:
        """Continue from `folder/policy` and `folder/learner.pt`. InputError when the shapes are another model's."""
        saved = load_policy(str(folder / "policy"), dtype=torch.float32, device=self.device).state_dict()
        own = self.policy.state_dict()
        for name in [*own, *saved]:
            if name not in saved or name not in own or saved[name].shape != own[name].shape:
                here = list(own[name].shape) if name in own else "nothing"
                there = list(saved[name].shape) if name in saved else "nothing"
                raise InputError(
                    f"checkpoint {folder} is of another shape: {name} is {there} there and {here} in {self.config.policy.path}; "
                    "resume with the policy it was made from"
                )
        self.policy.load_state_dict(saved)
        state = torch.load(folder / "learner.pt", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if (state["adagc"] is None) != (self.adagc is None):
            raise InputError(
                f"checkpoint {folder} was made with another learner.clipping.method; keep it when resuming"
            )
        if self.adagc is not None:
            self.adagc.load_state_dict(state["adagc"])
        self.version = state["version"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        torch.set_rng_state(state["rng"].cpu())


def microbatches(batch: TrainingBatch, rows: list[int], tokens_per_microbatch: int) -> list[list[int]]:
    """Rows sorted by length (little padding for kernels that pad) and cut where the token budget is full."""
    length = {row: len(batch.prompt_ids[row]) + len(batch.completion_ids[row]) for row in rows}
    parts: list[list[int]] = []
    used = 0
    for row in sorted(rows, key=lambda row: (length[row], row)):
        if not parts or used + length[row] > tokens_per_microbatch:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += length[row]
    return parts


def pack(batch: TrainingBatch, rows: list[int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed inputs of some rows.

    Returns:
        (input_ids [T], cu_seqlens [B+1] int32, predict [N] positions in T whose hidden state predicts a completion
        token, targets [N] those tokens), rows in order.
    """
    ids: list[int] = []
    ends = [0]
    predict: list[int] = []
    targets: list[int] = []
    for row in rows:
        prompt, completion = batch.prompt_ids[row], batch.completion_ids[row]
        start = len(ids) + len(prompt) - 1
        predict += range(start, start + len(completion))
        targets += completion
        ids += prompt + completion[:-1]  # nothing is predicted from the last token
        ends.append(len(ids))
    return (
        torch.tensor(ids, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(predict, device=device),
        torch.tensor(targets, device=device),
    )


def _schedule(step: int, total: int, config: RunConfig) -> float:
    warmup = config.learner.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if config.learner.schedule == "linear":
        return 1 - progress
    if config.learner.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
