"""The learner's optimizers by name: AdamW with its moments in float32 on the device, in 8 bits, or in the host's memory.

Why not the libraries' offloading: torchao's CPUOffloadOptimizer sends each gradient to the host while backward still runs, before
it could be clipped, and is for one GPU; FSDP2's CPUOffloadPolicy keeps the weights themselves on the host, so that every forward
pass waits for the bus.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plumbline.errors import InputError
from plumbline.rl.distributed import Ranks
from plumbline.rl.sections import LearnerSection

MOMENT_BITS = {"adamw": 32, "adamw_8bit": 8, "adamw_offload": 32}


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments, and the weights it updates, are in the host's memory: copies of the parameters, shards alike.

    A step brings the gradients to the host, updates the copies there (torch's fused CPU AdamW, so the numbers are those of
    AdamW on a CPU) and sends the weights back. What crosses lies in pinned memory, the moments do not. Beside a GPU that
    takes 16 bytes a parameter from the host, and 8 bytes a parameter fewer on the device.

    Args:
        parameters: float32, on the learner's device; for several processes DTensors of one mesh dimension.
        ranks: this process among the learner's.
        settings: AdamW's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks, **settings: Any) -> None:
        self.parameters = list(parameters)
        self.mesh = _host_mesh(ranks)
        self.weights = [_host_buffer(parameter) for parameter in self.parameters]
        self.gradients = [_host_buffer(parameter) for parameter in self.parameters]
        self.copies = {
            parameter: nn.Parameter(self._like(parameter, weights))
            for parameter, weights in zip(self.parameters, self.weights, strict=True)
        }
        super().__init__(self.copies.values(), fused=True, **settings)
        self.read_weights()

    @torch.no_grad()
    def read_weights(self) -> None:
        """Copy the parameters to the host; to be called when something else than `step` has changed them."""
        for parameter, weights in zip(self.parameters, self.weights, strict=True):
            weights.copy_(_local(parameter))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the parameters that have a gradient."""
        assert closure is None
        for parameter, gradients in zip(self.parameters, self.gradients, strict=True):
            copy = self.copies[parameter]
            if parameter.grad is None:
                copy.grad = None
                continue
            gradients.copy_(_local(parameter.grad), non_blocking=True)
            copy.grad = self._like(parameter, gradients)
        for device in {parameter.device for parameter in self.parameters if parameter.is_cuda}:
            # Until the gradients are here, and the weights that the last step sent, which this one overwrites, are there.
            torch.cuda.current_stream(device).synchronize()
        super().step()
        for parameter, weights in zip(self.parameters, self.weights, strict=True):
            if parameter.grad is not None:
                _local(parameter).copy_(weights, non_blocking=True)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters; the copies' gradients are overwritten by the next step."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def _like(self, parameter: Tensor, local: Tensor) -> Tensor:
        """A host buffer as the parameter is: itself, or a shard of the ranks' mesh on their hosts."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        shard = cast("Any", parameter)
        return DTensor.from_local(
            local, self.mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
        )


def make_optimizer(
    settings: LearnerSection, parameters: Sequence[nn.Parameter], learning_rate: float, ranks: Ranks
) -> torch.optim.Optimizer:
    """settings.optimizer over the trainable parameters. InputError where it cannot run."""
    shared: dict[str, Any] = {
        "lr": learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw_offload":
        return HostAdamW(parameters, ranks, **shared)
    if settings.optimizer == "adamw_8bit":
        check_optimizer(settings)
        return _adamw_8bit(parameters, ranks, **shared)
    return torch.optim.AdamW(parameters, fused=True, **shared)


def check_optimizer(settings: LearnerSection) -> None:
    """InputError when the package that settings.optimizer needs is not installed."""
    if settings.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("learner.optimizer adamw_8bit needs bitsandbytes: pip install 'plumbline-rl[adamw-8bit]'")


def keeps_state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> nn.Parameter:
    """The tensor under which the optimizer keeps what it knows of a parameter: itself, or its copy on the host."""
    return optimizer.copies[parameter] if isinstance(optimizer, HostAdamW) else parameter


def after_loading(optimizer: torch.optim.Optimizer) -> None:
    """To be called once the parameters and the optimizer's state hold what a checkpoint has."""
    if isinstance(optimizer, HostAdamW):
        optimizer.read_weights()
    elif not isinstance(optimizer, torch.optim.AdamW):  # bitsandbytes', to which the count of steps is a number
        for state in optimizer.state.values():
            state["step"] = int(state["step"])


def _adamw_8bit(parameters: Sequence[nn.Parameter], ranks: Ranks, **settings: Any) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit: tensors of 4,096 elements or more have moments of 8 bits, with a scale for each 256 of them."""
    if ranks.size > 1:
        raise InputError("learner.optimizer adamw_8bit needs learner.workers 1; use adamw or adamw_offload")
    from bitsandbytes.optim import AdamW8bit

    def make(tensors: Sequence[nn.Parameter]) -> Any:
        optimizer = AdamW8bit(tensors, **settings)
        # A second moment far below the largest of its block would be rounded to 0, and the first moment then divided by
        # almost nothing (arXiv 2309.01507): it is rounded up to the smallest positive code instead. A block of
        # zeros stays 0, its scale being 0.
        codes = optimizer.name2qmap["udynamic"]
        codes[0] = codes[1]
        return optimizer

    # Its kernels are built for some CUDA versions; whether for this one shows when they run.
    trial = nn.Parameter(torch.ones(4096, device=parameters[0].device))
    trial.grad = torch.ones_like(trial)
    try:
        make([trial]).step()
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"learner.optimizer adamw_8bit: bitsandbytes does not run on {trial.device}: {reason[0]}"
        ) from None
    return make(parameters)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor."""
    tensor = tensor.detach()
    return cast("Any", tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _host_buffer(parameter: Tensor) -> Tensor:
    local = _local(parameter)
    return torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)


def _host_mesh(ranks: Ranks) -> Any:
    """The ranks on their hosts, who talk by gloo; None for one process."""
    if ranks.size == 1:
        return None
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(ranks.files, "cpu")
