"""Which implementation runs."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
# The kernels keep a whole selection block, and a row of a head, in registers.
LARGEST_SELECT_BLOCK = 128
LARGEST_DIM = 256


def use_triton(backend: Backend, x: Tensor, select_block: int = 1) -> bool:
    """Whether the Triton kernels run for x. ValueError: Triton was asked for by name and cannot.

    On a CPU, `triton` needs TRITON_INTERPRET=1 (tests only: the interpreter is slow).
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be auto, triton or torch, got {backend!r}")
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return False
    reason = None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"float32, bfloat16 or float16, not {x.dtype}"
    elif x.shape[-1] > LARGEST_DIM:
        reason = f"head dims up to {LARGEST_DIM}, not {x.shape[-1]}"
    elif select_block > LARGEST_SELECT_BLOCK:
        reason = f"select_block up to {LARGEST_SELECT_BLOCK}, not {select_block}"
    elif x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"a CUDA device (or TRITON_INTERPRET=1), not {x.device}"
    if reason and backend == "triton":
        raise ValueError(f"backend triton needs {reason}")
    return reason is None
