"""Generalised advantage estimation (arXiv 1506.02438) for token-level PPO with a critic."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.

    Positions outside the mask are skipped, not treated as states: the next state of t is the next masked-in position,
    and the value after the last one is 0 (the episode ends there).

    Args:
        rewards: [B, T] float, reward of each token.
        values: [B, T] float, critic's value before each token.
        mask: [B, T] bool or 0/1, True on completion tokens.
        gamma: discount.
        lam: GAE's lambda.

    Returns:
        (advantages [B, T], returns [B, T]), zero outside the mask.

    Raises:
        ValueError: shapes differ.
    """
    if not rewards.shape == values.shape == mask.shape or rewards.ndim != 2:
        raise ValueError(
            f"rewards, values and mask must share one shape [B, T], got {list(rewards.shape)}, {list(values.shape)}, {list(mask.shape)}"
        )
    inside = mask.bool()
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(inside[:, t], delta + gamma * lam * running, running)
        next_value = torch.where(inside[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(inside[:, t], running, torch.zeros_like(running))
    return advantages, torch.where(inside, advantages + values, torch.zeros_like(values))
