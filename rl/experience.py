"""A batch with everything its losses need, worked out before the first optimizer step on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plumbline.rl import advantages as estimators
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.losses import kl_penalty, rollout_correction
from plumbline.rl.sections import AlgorithmSection


@dataclass(frozen=True)
class Experience:
    """Tensors over the batch's n completions, padded to its longest, W.

    Attributes:
        batch: token ids.
        mask: [n, W] bool, True on completion tokens.
        old_logprobs: [n, W], what the ratio is taken to.
        advantages: [n, 1] or [n, W].
        weights: [n, W] correction of the rollout's log-probabilities, or None.
        reference_logprobs: [n, W] for a KL penalty, or None.
        values, returns: [n, W] with a critic, or None.
    """

    batch: TrainingBatch
    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


def make_experience(
    algorithm: AlgorithmSection,
    batch: TrainingBatch,
    mask: Tensor,
    rollout_logprobs: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    values: Tensor | None = None,
) -> Experience:
    """From log-probabilities and values [n, W] to advantages, returns and correction weights.

    Args:
        algorithm: the run's.
        mask: [n, W] bool.
        rollout_logprobs: the engine's.
        old_logprobs: the learner's, when algorithm.correction asks for them.
        reference_logprobs: when there is a KL penalty.
        values: when there is a critic.
    """
    rewards = torch.tensor(batch.rewards, dtype=torch.float32, device=mask.device)
    divergence = None
    if reference_logprobs is not None and algorithm.kl_in == "reward":
        now = rollout_logprobs if old_logprobs is None else old_logprobs
        divergence = kl_penalty(now, reference_logprobs, algorithm.kl_estimator)
    advantages, returns = estimate_advantages(algorithm, rewards, batch.group_size, mask, divergence, values)
    weights = None
    correction = algorithm.correction
    if correction.method != "none":
        assert old_logprobs is not None
        weights = rollout_correction(
            old_logprobs, rollout_logprobs, mask, correction.method, correction.level, correction.low, correction.high
        )
    return Experience(
        batch,
        mask,
        rollout_logprobs if old_logprobs is None else old_logprobs,
        advantages,
        weights,
        reference_logprobs,
        values,
        returns,
    )


def estimate_advantages(
    algorithm: AlgorithmSection,
    rewards: Tensor,
    group_size: int,
    mask: Tensor,
    divergence: Tensor | None = None,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The estimator that algorithm.advantage names, with the KL penalty inside the reward where one is given.

    `gae` and `reinforce_pp` take the penalty token by token; estimators that compare whole completions subtract its sum
    from the completion's reward.

    Args:
        rewards: [n] float, a group's completions being neighbours.
        mask: [n, W] bool.
        divergence: [n, W] KL estimate a token, if it goes into the reward.
        values: [n, W], for gae.

    Returns:
        (advantages [n, 1] or [n, W], returns [n, W] or None).
    """
    coefficient = algorithm.kl_coefficient
    if algorithm.advantage == "gae":
        assert values is not None
        per_token = estimators.token_rewards(rewards, mask, divergence, coefficient)
        advantages, returns = estimators.gae(per_token, values, mask, algorithm.gamma, algorithm.lam)
        return estimators.whiten(advantages, mask), returns
    if divergence is not None and algorithm.advantage == "reinforce_pp":
        per_token = estimators.token_rewards(rewards, mask, divergence, coefficient)
        return estimators.reinforce_pp_tokens(per_token, mask), None
    if divergence is not None:
        rewards = rewards - coefficient * (divergence * mask).sum(1)
    estimator = getattr(estimators, algorithm.advantage)
    return estimator(rewards.view(-1, group_size)).reshape(-1, 1), None
