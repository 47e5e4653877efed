"""Low-rank adapters (arXiv 2106.09685) by peft, inside the policy: the rollout engines see merged weights and know nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plumbline.errors import InputError
from plumbline.rl.sections import LoraSection


def add_adapters(policy: nn.Module, settings: LoraSection) -> None:
    """Freeze the policy and put trainable adapters on settings.targets, in place. B starts at zero: the function is unchanged.

    Raises InputError when peft is not installed or a target names no layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("learner.lora.rank needs the package peft: pip install 'plumbline-rl[lora]'") from None
    if settings.targets is not None:
        known = {name.rsplit(".", 1)[-1] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
        unknown = sorted(set(settings.targets) - known)
        if unknown:
            raise InputError(
                f"learner.lora.targets names no layer: {unknown[0]!r}; the policy has {', '.join(sorted(known))}"
            )
    targets = settings.targets or ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    policy.requires_grad_(False)
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(lora, policy)


@contextmanager
def without_adapters(policy: nn.Module) -> Iterator[None]:
    """The policy as it was before training: the reference of a KL penalty, without a second copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def plain_name(name: str) -> str:
    """What a tensor is called in a policy without adapters."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def merged_state(state: dict[str, Tensor], alpha: float, rank: int) -> dict[str, Tensor]:
    """A state dict with adapters -> the plain policy's: W + alpha / rank B A under the names without adapters.

    Args:
        state: full tensors by name.
        alpha, rank: the adapters'.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        plain = plain_name(name)
        if plain != name and name.endswith(".weight"):
            stem = name.removesuffix("base_layer.weight")
            down, up = state[f"{stem}lora_A.default.weight"], state[f"{stem}lora_B.default.weight"]
            tensor = tensor + (alpha / rank) * (up @ down)
        merged[plain] = tensor
    return merged


def adapter_state(state: dict[str, Any]) -> dict[str, Any]:
    """The adapters' own tensors of a state dict."""
    return {name: tensor for name, tensor in state.items() if ".lora_" in name}
