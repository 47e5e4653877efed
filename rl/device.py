"""Where tensors live, and how many CPUs may compute them."""

import os

import torch

from plumbline.errors import InputError


def pick_device(wanted: str) -> str:
    """`auto` -> `cuda` if there is one, else `cpu`; anything else must exist (InputError)."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise InputError(f"policy.device {wanted!r} is not a torch device; use auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "policy.device is cuda, but torch sees no GPU; use auto or cpu, or install a CUDA build of torch"
        )
    return wanted


def usable_cpus() -> int:
    """CPUs that this process may run on: fewer than the machine's under taskset or a job scheduler's CPU set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
