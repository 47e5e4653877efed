"""Losses: one pure function on tensors a file."""

from plumbline.rl.losses.aggregate import aggregate
from plumbline.rl.losses.correction import rollout_correction
from plumbline.rl.losses.kl import kl_penalty
from plumbline.rl.losses.policy import LossConfig, policy_loss
from plumbline.rl.losses.value import value_loss

__all__ = ["LossConfig", "aggregate", "kl_penalty", "policy_loss", "rollout_correction", "value_loss"]
