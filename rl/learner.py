"""The learner: turns a batch of graded completions into optimizer steps. It knows nothing of Ray."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from plumbline.errors import RunStopped
from plumbline.models.load import load_policy
from plumbline.models.policy import Policy
from plumbline.models.value import ValueModel
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.blocks import BlockCodec
from plumbline.rl.clipping import GlobalClipper, make_clipper
from plumbline.rl.config import RunConfig
from plumbline.rl.distributed import Ranks
from plumbline.rl.experience import Experience, make_experience
from plumbline.rl.liger import use_liger
from plumbline.rl.logprobs import token_logprobs
from plumbline.rl.lora import add_adapters, without_adapters
from plumbline.rl.losses import LossConfig, aggregate, kl_penalty, policy_loss, value_loss
from plumbline.rl.losses.ratio import importance_ratio
from plumbline.rl.optimizers import make_optimizer
from plumbline.rl.packing import Packed, completion_mask, microbatches, pack, padded


class NonFiniteGradients(RunStopped):
    """More optimizer steps in a row than allowed had a NaN or Inf gradient."""


class Learner:
    """Policy, critic, optimizers and gradient clipping of one training run.

    Args:
        config: the run's.
        device: torch device string.
        ranks: this process among the learner's; every method must then be called on every rank with the same arguments.
    """

    def __init__(self, config: RunConfig, device: str, ranks: Ranks | None = None) -> None:
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        algorithm, settings = config.algorithm, config.learner
        self.half = settings.precision == "bfloat16"
        # Dropout and initialisation of new tensors (a converted checkpoint's phi, adapters) draw from the run's seed.
        torch.manual_seed(config.seed)
        self.policy = self._load(config.policy.path)
        self.blocks = BlockCodec(self.policy.config) if config.rollout.replay_blocks else None
        if settings.lora.rank:
            add_adapters(self.policy, settings.lora)
        if settings.liger:
            use_liger(self.policy)
        self.ranks.shard(self.policy, bfloat16=self.half)
        self.reference: Policy | None = None
        if algorithm.kl_coefficient > 0 and not settings.lora.rank:
            self.reference = self._load(config.policy.path).requires_grad_(False).eval()
            self.ranks.shard(self.reference, bfloat16=self.half)
        self.critic: ValueModel | None = None
        if algorithm.advantage == "gae":
            self.critic = ValueModel(self._load(algorithm.critic.path or config.policy.path))
            self.ranks.shard(self.critic, bfloat16=self.half)
        for model in (self.policy, self.critic):
            if model is not None:
                model.train()
                if settings.gradient_checkpointing:
                    model.gradient_checkpointing_enable()
        self.optimizer, self.scheduler = self._optimizer(self.policy, settings.learning_rate)
        self.clipper = make_clipper(settings.clipping, self.policy)
        if self.critic is not None:
            self.critic_optimizer, self.critic_scheduler = self._optimizer(self.critic, algorithm.critic.learning_rate)
            self.critic_clipper = GlobalClipper(self.critic, algorithm.critic.max_norm)
        self.version = 0
        self.skipped_in_a_row = 0

    def _load(self, path: str) -> Policy:
        policy = load_policy(path, attention=self.config.policy.attention, dtype=torch.float32, device=self.device)
        if self.half:
            # As in the rollout engine, so that the two disagree less; and half the traffic.
            policy.model.residual_dtype = torch.bfloat16
        return policy

    def _optimizer(
        self, model: torch.nn.Module, learning_rate: float
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        settings = self.config.learner
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(settings, trainable, learning_rate, self.ranks)
        updates = self.config.steps * settings.epochs * settings.minibatches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, updates, self.config))
        return optimizer, schedule

    def update(self, batch: TrainingBatch) -> dict[str, float]:
        """Train on one step's batch: `epochs` passes of `minibatches` optimizer steps each. Returns mean metrics."""
        settings = self.config.learner
        totals: dict[str, list[float]] = defaultdict(list)
        experience = self.prepare(batch)
        groups = len(batch) // batch.group_size
        # A step of dynamic sampling may bring fewer groups than minibatches.
        shares = min(settings.minibatches, groups)
        for _ in range(settings.epochs):
            for share in range(shares):
                first, last = groups * share // shares, groups * (share + 1) // shares
                rows = list(range(first * batch.group_size, last * batch.group_size))
                for name, value in self._optimizer_step(experience, rows).items():
                    totals[name].append(value)
        self.version += 1
        metrics = {name: sum(values) / len(values) for name, values in totals.items()}
        metrics["learner/skipped_steps"] = sum(totals["learner/skipped_steps"])
        metrics["learner/ratio_max"] = max(totals["learner/ratio_max"])
        return metrics | self._experience_metrics(experience)

    def prepare(self, batch: TrainingBatch) -> Experience:
        """What the losses need beside the current log-probabilities: see Experience. Forward passes only where needed."""
        algorithm = self.config.algorithm
        mask = completion_mask([len(ids) for ids in batch.completion_ids], self.device)
        old = reference = values = None
        if algorithm.correction.method != "none":
            old = self._score(batch, mask, lambda packed: self._logprobs(self.policy, packed)[0])
        if algorithm.kl_coefficient > 0:
            with without_adapters(self.policy) if self.reference is None else nullcontext():
                model = self.reference or self.policy
                # Another function, which chooses for itself.
                reference = self._score(batch, mask, lambda packed: self._logprobs(model, packed, replay=False)[0])
        if self.critic is not None:
            values = self._score(batch, mask, self._values)
        rollout = padded(batch.logprobs, self.device)
        return make_experience(
            algorithm, batch, mask, rollout, old_logprobs=old, reference_logprobs=reference, values=values
        )

    @torch.no_grad()
    def _score(self, batch: TrainingBatch, mask: Tensor, forward: Any) -> Tensor:
        """forward(packed) -> one number a completion token, over the whole batch: [n, W], the same on every rank."""
        result = torch.zeros(mask.shape, device=self.device)
        for micro, counts in self._shares(batch, list(range(len(batch)))):
            packed = pack(batch, micro, self.device, self.blocks)
            values = packed.spread(forward(packed))
            if counts:
                result[micro, : values.shape[1]] = values
        return self.ranks.sum(result)

    def _shares(self, batch: TrainingBatch, rows: list[int]) -> list[tuple[list[int], bool]]:
        """This rank's microbatches of some rows: see Ranks.share. Sharded layers must run as often on every rank."""
        budget, several = self.config.learner.tokens_per_microbatch, self.ranks.size > 1
        return self.ranks.share(microbatches(batch, rows, budget, one_pass=several))

    def _optimizer_step(self, experience: Experience, rows: list[int]) -> dict[str, float]:
        algorithm, batch = self.config.algorithm, experience.batch
        tokens = sum(len(batch.completion_ids[row]) for row in rows)
        loss_config = LossConfig(
            surrogate=algorithm.surrogate,
            ratio=algorithm.ratio,
            aggregation=algorithm.aggregation,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            max_length=self.config.rollout.max_new_tokens,
            normalizer=float(tokens if algorithm.aggregation == "token" else len(rows)),
        )
        kl_in_loss = algorithm.kl_coefficient > 0 and algorithm.kl_in == "loss"
        if not kl_in_loss and algorithm.entropy_coefficient == 0 and self.critic is None:
            # A completion of zero advantage has no gradient: not computing it changes nothing but the time. One row
            # stays in any case, so that a step without signal still has (zero) gradients.
            signal = (experience.advantages[rows] != 0).any(1).tolist()
            rows = [row for row, has in zip(rows, signal, strict=True) if has] or rows[:1]
        seen = sum(len(batch.completion_ids[row]) for row in rows)
        sums: dict[str, float] = defaultdict(float)
        waiting: list[tuple[list[str], Tensor, float, bool]] = []
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)
        for micro, counts in self._shares(batch, rows):
            packed = pack(batch, micro, self.device, self.blocks)
            loss, stats = self._policy_loss(experience, packed, loss_config, tokens)
            # Sharded gradients come out as the mean over ranks; a repeated microbatch keeps ranks in step and weighs nothing.
            scale = self.ranks.size if counts else 0
            (loss * scale).backward()
            if self.critic is not None:
                critic_loss = self._value_loss(experience, packed, tokens)
                (critic_loss * scale).backward()
                stats["critic_loss_sum"] = critic_loss.detach()
            stats["loss_sum"] = loss.detach()
            share = sum(len(batch.completion_ids[row]) for row in micro) / seen if counts else 0.0
            waiting.append((list(stats), torch.stack([value.detach() for value in stats.values()]), share, counts))
        # Read once all microbatches are under way: reading makes the host wait for the device, and the device then for the
        # host to pack the next one.
        for names, values, share, counts in waiting:
            for name, value in zip(names, values.tolist(), strict=True):
                key = f"learner/{name.removesuffix('_sum')}"
                if name.endswith("_max"):
                    sums[key] = max(sums[key], value * bool(counts))
                else:
                    sums[key] += value * (float(counts) if name.endswith("_sum") else share)
        sums = self.ranks.combine(dict(sums), self.device)
        sums["learner/learning_rate"] = float(self.scheduler.get_last_lr()[0])
        norm = sums["learner/gradient_norm"] = self.clipper.clip().item()
        finite = math.isfinite(norm)
        if self.critic is not None:
            critic_norm = sums["learner/critic_gradient_norm"] = self.critic_clipper.clip().item()
            finite = finite and math.isfinite(critic_norm)
        self._step(finite)
        sums["learner/skipped_steps"] = float(not finite)
        return sums

    def _step(self, finite: bool) -> None:
        """One step of the optimizers, or of the schedules alone after a gradient that is not finite."""
        if finite:
            self.optimizer.step()
            if self.critic is not None:
                self.critic_optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            limit = self.config.learner.max_skipped_steps
            if self.skipped_in_a_row > limit:
                raise NonFiniteGradients(
                    f"{self.skipped_in_a_row} optimizer steps in a row had a NaN or Inf gradient "
                    f"(learner.max_skipped_steps is {limit}); lower learner.learning_rate or look at the last batch"
                )
        self.scheduler.step()
        if self.critic is not None:
            self.critic_scheduler.step()

    def _policy_loss(
        self, experience: Experience, packed: Packed, loss_config: LossConfig, tokens: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one microbatch, already over the whole minibatch's denominator, and its stats."""
        algorithm, mask, rows = self.config.algorithm, packed.mask, packed.rows
        width = mask.shape[1]

        def part(tensor: Tensor) -> Tensor:
            return tensor[rows, :width] if tensor.shape[1] > 1 else tensor[rows]

        bonus = algorithm.entropy_coefficient
        logprobs, entropy = self._logprobs(self.policy, packed, entropy_gradient=bonus > 0)
        current = packed.spread(logprobs)
        weights = None if experience.weights is None else part(experience.weights)
        loss, stats = policy_loss(
            current, part(experience.old_logprobs), part(experience.advantages), mask, loss_config, weights=weights
        )
        stats["entropy"] = entropy.detach().mean()
        if bonus > 0:
            loss = loss - bonus * aggregate(packed.spread(entropy), mask, "token", normalizer=float(tokens))
        if experience.reference_logprobs is not None:
            divergence = kl_penalty(current, part(experience.reference_logprobs), algorithm.kl_estimator)
            stats["kl_reference"] = (divergence.detach() * mask).sum() / mask.sum()
            if algorithm.kl_in == "loss":
                if algorithm.kl_unbiased:
                    # The tokens came from the old policy: E_old[rho k] is the KL, and its gradient flows through rho.
                    divergence = divergence * importance_ratio(
                        current - part(experience.old_logprobs), mask, algorithm.ratio
                    )
                loss = loss + algorithm.kl_coefficient * loss_config.aggregate(divergence, mask)
        return loss, stats

    def _value_loss(self, experience: Experience, packed: Packed, tokens: int) -> Tensor:
        assert experience.values is not None
        assert experience.returns is not None
        rows, width = packed.rows, packed.mask.shape[1]
        return value_loss(
            packed.spread(self._values(packed)),
            experience.values[rows, :width],
            experience.returns[rows, :width],
            packed.mask,
            self.config.algorithm.critic.clip,
            normalizer=float(tokens),
        )

    def _logprobs(
        self, policy: Policy, packed: Packed, *, entropy_gradient: bool = False, replay: bool = True
    ) -> tuple[Tensor, Tensor]:
        with self._autocast():
            blocks = packed.blocks if replay else None
            hidden = policy.hidden_states(packed.ids, packed.cu_seqlens, blocks)[packed.predict]
            return token_logprobs(
                hidden,
                packed.targets,
                policy.lm_head,
                temperature=self.config.rollout.temperature,
                chunk_tokens=self.config.learner.logprob_chunk_tokens,
                entropy_gradient=entropy_gradient,
            )

    def _values(self, packed: Packed) -> Tensor:
        """The critic's value before each completion token, [N]."""
        assert self.critic is not None
        with self._autocast():
            return self.critic(packed.ids, packed.cu_seqlens)[packed.predict]

    def _autocast(self) -> Any:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=self.half)

    def _experience_metrics(self, experience: Experience) -> dict[str, float]:
        mask = experience.mask
        metrics = {}
        if experience.weights is not None:
            weights = experience.weights[mask]
            metrics["learner/correction_mean"] = weights.mean().item()
            metrics["learner/correction_zeroed"] = (weights == 0).float().mean().item()
        if experience.values is not None and experience.returns is not None:
            returns = experience.returns[mask]
            left = (returns - experience.values[mask]).var(unbiased=False) / returns.var(unbiased=False).clamp(
                min=1e-12
            )
            metrics["learner/explained_variance"] = 1 - left.item()
        return metrics


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
