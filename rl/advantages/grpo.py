"""GRPO (arXiv 2402.03300, eq. 3): rewards standardised within each prompt's group."""

import torch
from torch import Tensor


def grpo(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_pg = (r_pg - mean_p) / (std_p + eps), std with G - 1 degrees of freedom.

    Args:
        rewards: [P, G] float, reward of completion g of prompt p; G >= 2.
        eps: keeps a group of equal rewards at exactly zero advantage instead of 0/0.

    Returns:
        [P, G] advantages, same dtype.

    Raises:
        ValueError: rewards is not [P, G >= 2].
    """
    check_groups(rewards)
    return centre(rewards) / (rewards.std(1, keepdim=True) + eps)


def centre(rewards: Tensor) -> Tensor:
    """r - mean of its row; a row of equal rewards gives exactly zero, whatever the rounding of its mean."""
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(flat, torch.zeros_like(rewards), rewards - rewards.mean(1, keepdim=True))


def check_groups(rewards: Tensor) -> None:
    """Raise ValueError unless rewards is a floating [P, G] tensor with G >= 2."""
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not torch.is_floating_point(rewards):
        raise ValueError(
            f"rewards must be a float tensor [prompts, completions >= 2], got {rewards.dtype} {list(rewards.shape)}"
        )
