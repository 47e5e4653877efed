"""Rollout engines. Each answers the protocol below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from plumbline.rl.batch import Group, Prompt, Sampling
    from plumbline.rl.config import RunConfig
    from plumbline.rl.text import Codec


class RolloutEngine(Protocol):
    """What a RolloutWorker owns."""

    version: int

    def generate(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Each prompt's group, token ids with log-probabilities, as it is finished."""
        ...

    def load_weights(self, version: int, tensors: dict[str, Tensor]) -> None:
        """All of the policy's tensors at once."""
        ...

    def checksum(self) -> float:
        """absolute_sum of the weights it holds."""
        ...

    def sleep(self) -> None:
        """Give the GPU's memory back; nothing is under way."""
        ...

    def wake(self) -> None:
        """Be as before `sleep`."""
        ...


class CarryingEngine(RolloutEngine, Protocol):
    """One that takes new weights while completions are under way: the native engine."""

    def generate_in_parts(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group | None]:
        """As `generate`, with None in between whenever new weights may be loaded."""
        ...


def absolute_sum(tensors: Iterable[Tensor]) -> float:
    """Sum of absolute values in float64: equal on both sides of a transfer if it was whole."""
    import torch

    return torch.stack([tensor.detach().abs().sum(dtype=torch.float64) for tensor in tensors]).sum().item()


def make_engine(config: RunConfig, path: str, attention: str | None, codec: Codec, device: str) -> RolloutEngine:
    """The engine that rollout.engine names, with the policy at `path`."""
    import torch

    settings = config.rollout
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    if settings.engine == "vllm":
        from plumbline.rl.rollout.vllm import VLLMEngine

        return VLLMEngine(
            path,
            attention=attention,
            codec=codec,
            slots=settings.slots,
            max_length=config.prompt.max_tokens + max(settings.max_new_tokens, config.evaluation.max_new_tokens or 0),
            dtype=dtype,
            memory_share=settings.memory_share,
            seed=config.seed,
            sleeps=device.startswith("cuda") and settings.sleep_in_update,
        )
    from plumbline.rl.rollout.native import NativeEngine

    return NativeEngine(path, attention=attention, codec=codec, slots=settings.slots, device=device, dtype=dtype)
