"""Several learner processes as one: ranks, sums over them, and parameters sharded by FSDP2 (torch `fully_shard`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from plumbline.models.policy import Policy
from plumbline.models.value import ValueModel

T = TypeVar("T")

# The hidden states are a view of padded ones; nothing changes them in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


@dataclass(frozen=True)
class Ranks:
    """This process among the learner's processes; one alone needs no process group.

    Attributes:
        files: process group on the CPU in which the ranks agree on files while the default one trains; None for one rank.
    """

    rank: int = 0
    size: int = 1
    files: Any = None

    @classmethod
    def join(cls, rank: int, size: int, address: str, device: str, timeout_seconds: float) -> Ranks:
        """Meet the others at tcp://`address`; raises torch's DistStoreError when they do not come in time."""
        if size == 1:
            return cls(rank, size)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.startswith("cuda") else "gloo",
                init_method=f"tcp://{address}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        return cls(rank, size, dist.new_group(backend="gloo"))

    def share(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's parts, as many on every rank: (part, whether it counts). Surplus places repeat the first part.

        Sharded layers gather their weights in step, so no rank may run a forward pass alone.
        """
        rounds = -(-len(parts) // self.size)
        places = [number * self.size + self.rank for number in range(rounds)]
        return [(parts[place], True) if place < len(parts) else (parts[0], False) for place in places]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def combine(self, sums: dict[str, float], device: str) -> dict[str, float]:
        """Each entry summed over ranks, or its maximum where the name ends in `_max`. Same keys on every rank."""
        if self.size == 1:
            return sums
        names = sorted(sums)
        for operation, chosen in (
            (dist.ReduceOp.SUM, [name for name in names if not name.endswith("_max")]),
            (dist.ReduceOp.MAX, [name for name in names if name.endswith("_max")]),
        ):
            values = torch.tensor([sums[name] for name in chosen], dtype=torch.float64, device=device)
            if chosen:
                dist.all_reduce(values, operation)
            sums.update(zip(chosen, values.tolist(), strict=True))
        return sums

    def shard(self, model: Policy | ValueModel, *, bfloat16: bool) -> None:
        """fully_shard each layer and the rest, in place; does nothing for one process.

        Gradients come out as the mean over ranks, reduced in float32; the shards stay float32.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        layers: Any = model.model.layers
        for layer in layers:
            fully_shard(layer, mp_policy=precision)
        fully_shard(model, mp_policy=precision)
        if isinstance(model, Policy):
            register_fsdp_forward_method(model, "hidden_states")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (every rank must call), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
