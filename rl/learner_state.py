"""A learner on disk and on its way to the rollout engines: full tensors, so that any number of processes can read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumbline.errors import InputError
from plumbline.models.load import load_policy
from plumbline.rl.distributed import (
    load_whole_optimizer_state,
    load_whole_state,
    whole,
    whole_optimizer_state,
    whole_state,
)
from plumbline.rl.learner import Learner
from plumbline.rl.lora import adapter_state, merged_state


def policy_weights(learner: Learner) -> dict[str, Tensor]:
    """The policy's tensors by name, whole, adapters merged, a tied tensor once. Every rank must call."""
    tensors = {name: whole(parameter.detach()) for name, parameter in learner.policy.named_parameters()}
    lora = learner.config.learner.lora
    return merged_state(tensors, lora.alpha, lora.rank) if lora.rank else tensors


def save(learner: Learner, folder: Path) -> None:
    """Write folder/policy (a Hugging Face folder) and folder/learner.pt. Every rank must call; rank 0 writes."""
    policy = whole_state(learner.policy)
    lora = learner.config.learner.lora
    state: dict[str, Any] = {
        "optimizer": whole_optimizer_state(learner.policy, learner.optimizer),
        "scheduler": learner.scheduler.state_dict(),
        "clipping": learner.config.learner.clipping.method,
        "clipper": learner.clipper.state_dict(),
        "adapters": adapter_state(policy),
        "version": learner.version,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "rng": torch.get_rng_state(),
    }
    if learner.critic is not None:
        state["critic"] = whole_state(learner.critic)
        state["critic_optimizer"] = whole_optimizer_state(learner.critic, learner.critic_optimizer)
        state["critic_scheduler"] = learner.critic_scheduler.state_dict()
    if learner.ranks.rank == 0:
        target = folder / "policy"
        target.mkdir(parents=True)
        merged = merged_state(policy, lora.alpha, lora.rank) if lora.rank else policy
        learner.policy.save_pretrained(target, state_dict=merged)
        torch.save(state, folder / "learner.pt")


def load(learner: Learner, folder: Path) -> None:
    """Continue from what `save` wrote, in as many processes as there are now. InputError when it is another model's."""
    state = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True)
    if state["clipping"] != learner.config.learner.clipping.method:
        raise InputError(f"checkpoint {folder} was made with another learner.clipping.method; keep it when resuming")
    for part, here in (
        ("adapters", bool(learner.config.learner.lora.rank)),
        ("critic", learner.critic is not None),
    ):
        if bool(state.get(part)) != here:
            there = "with" if state.get(part) else "without"
            raise InputError(f"checkpoint {folder} was made {there} {part}; keep the learner's settings when resuming")
    own = learner.policy.state_dict()
    if learner.config.learner.lora.rank:
        saved = {**own, **state["adapters"]}
        saved = {name: whole(tensor) for name, tensor in saved.items()}
        check_shapes(state["adapters"], adapter_state(own), folder, learner.config.policy.path)
    else:
        saved = load_policy(str(folder / "policy"), dtype=torch.float32).state_dict()
        check_shapes(saved, own, folder, learner.config.policy.path)
    load_whole_state(learner.policy, saved)
    load_whole_optimizer_state(learner.policy, learner.optimizer, state["optimizer"])
    learner.scheduler.load_state_dict(state["scheduler"])
    learner.clipper.load_state_dict(state["clipper"])
    if learner.critic is not None:
        check_shapes(state["critic"], learner.critic.state_dict(), folder, "the critic's decoder")
        load_whole_state(learner.critic, state["critic"])
        load_whole_optimizer_state(learner.critic, learner.critic_optimizer, state["critic_optimizer"])
        learner.critic_scheduler.load_state_dict(state["critic_scheduler"])
    learner.version = state["version"]
    learner.skipped_in_a_row = state["skipped_in_a_row"]
    torch.set_rng_state(state["rng"])


def check_shapes(saved: dict[str, Tensor], own: dict[str, Tensor], folder: Path, path: str) -> None:
    """InputError that names the first tensor which the checkpoint and this learner do not have in common."""
    for name in [*own, *saved]:
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            here = list(own[name].shape) if name in own else "nothing"
            there = list(saved[name].shape) if name in saved else "nothing"
            raise InputError(
                f"checkpoint {folder} is of another shape: {name} is {there} there and {here} in {path}; "
                "resume with the policy it was made from"
            )
