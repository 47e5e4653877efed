"""Advantage estimators: one pure function on tensors a file. None of them knows Ray, a model or a loss."""

from plumbline.rl.advantages.dr_grpo import dr_grpo
from plumbline.rl.advantages.gae import gae
from plumbline.rl.advantages.grpo import grpo
from plumbline.rl.advantages.reinforce_pp import reinforce_pp, reinforce_pp_tokens
from plumbline.rl.advantages.reinforce_pp_baseline import reinforce_pp_baseline
from plumbline.rl.advantages.rloo import rloo
from plumbline.rl.advantages.token_rewards import token_rewards
from plumbline.rl.advantages.whiten import whiten

__all__ = [
    "dr_grpo",
    "gae",
    "grpo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "reinforce_pp_tokens",
    "rloo",
    "token_rewards",
    "whiten",
]
