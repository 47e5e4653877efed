"""REINFORCE++ (arXiv 2501.03262): no critic and no group baseline, normalised over the whole batch."""

import torch
from torch import Tensor

from plumbline.rl.advantages.grpo import centre, check_groups
from plumbline.rl.advantages.whiten import whiten


def reinforce_pp(rewards: Tensor, eps: float = 1e-8) -> Tensor:
    """A = (r - mean over the batch) / (std over the batch + eps).

    Args:
        rewards: [P, G] float; G >= 2.
        eps: keeps a batch of equal rewards at zero.

    Returns:
        [P, G] advantages.

    Raises:
        ValueError: rewards is not [P, G >= 2].
    """
    check_groups(rewards)
    return centre(rewards.view(1, -1)).view_as(rewards) / (rewards.std() + eps)


def reinforce_pp_tokens(token_rewards: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """The same with rewards a token (the KL penalty inside the reward): returns to go, normalised over all tokens.

    Args:
        token_rewards: [B, T] float; mask: [B, T] bool or 0/1.

    Returns:
        [B, T] advantages, zero outside the mask.
    """
    inside = torch.where(mask.bool(), token_rewards, torch.zeros_like(token_rewards))
    return whiten(inside.flip(1).cumsum(1).flip(1), mask, eps)
