"""Advantage estimators: one pure function on tensors a file. None of them knows Ray, a model or a loss."""

from plumbline.rl.advantages.dr_grpo import dr_grpo
from plumbline.rl.advantages.gae import gae
from plumbline.rl.advantages.grpo import grpo
from plumbline.rl.advantages.reinforce_pp import reinforce_pp
from plumbline.rl.advantages.rloo import rloo

__all__ = ["dr_grpo", "gae", "grpo", "reinforce_pp", "rloo"]
