"""Pieces that every kernel uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@triton.jit
def load_rows(ptr, offsets, ok, D: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from rows of D elements at these element offsets; zero where not ok and past D."""
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        return tl.load(ptr + offsets[:, None] + c[None, :], mask=ok[:, None], other=0.0)
    return tl.load(ptr + offsets[:, None] + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def load_all(ptr, offsets, D: tl.constexpr, BLOCK: tl.constexpr):
    """load_rows where every row is there."""
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        return tl.load(ptr + offsets[:, None] + c[None, :])
    return tl.load(ptr + offsets[:, None] + c[None, :], mask=(c < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offsets, ok, x, D: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        tl.store(ptr + offsets[:, None] + c[None, :], x.to(ptr.dtype.element_ty), mask=ok[:, None])
    else:
        tl.store(ptr + offsets[:, None] + c[None, :], x.to(ptr.dtype.element_ty), mask=ok[:, None] & (c < D)[None, :])


def pad_dim(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def rows_contiguous(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and launch settings of one kernel.

    Attributes:
        rows: query rows (queries x heads of a group) of a tile.
        keys: keys of a tile.
        warps, stages: of the launch.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def exact(dtype: torch.dtype) -> bool:
    """Whether dots must be IEEE float32."""
    return dtype == torch.float32


def precision(dtype: torch.dtype) -> str:
    return "ieee" if exact(dtype) else "tf32"


def fit_rows(rows: int, group: int) -> int:
    """Rows of a tile that hold at least one query of the group."""
    return max(rows, triton.next_power_of_2(group))
