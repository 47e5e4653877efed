"""Losses: one pure function on tensors a file."""

from plumbline.rl.losses.kl import kl_penalty
from plumbline.rl.losses.policy import LossConfig, policy_loss
from plumbline.rl.losses.value import value_loss

__all__ = ["LossConfig", "kl_penalty", "policy_loss", "value_loss"]
