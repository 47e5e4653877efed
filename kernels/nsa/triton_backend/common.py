"""Pieces that every kernel uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@triton.jit
def load_rows(ptr, offsets, ok, D: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from rows of D elements at these element offsets; zero where not ok and past D."""
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        x = tl.load(ptr + offsets[:, None] + c[None, :], mask=ok[:, None], other=0.0)
    else:
        x = tl.load(ptr + offsets[:, None] + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.0)
    return x


@triton.jit
def load_all(ptr, offsets, D: tl.constexpr, BLOCK: tl.constexpr):
    """load_rows where every row is there."""
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        x = tl.load(ptr + offsets[:, None] + c[None, :])
    else:
        x = tl.load(ptr + offsets[:, None] + c[None, :], mask=(c < D)[None, :], other=0.0)
    return x


@triton.jit
def store_rows(ptr, offsets, ok, x, D: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    if D == BLOCK:
        tl.store(ptr + offsets[:, None] + c[None, :], x.to(ptr.dtype.element_ty), mask=ok[:, None])
    else:
        tl.store(ptr + offsets[:, None] + c[None, :], x.to(ptr.dtype.element_ty), mask=ok[:, None] & (c < D)[None, :])


@triton.jit
def placed(at, RING: tl.constexpr):
    """Rows of tokens `at` in a slot: places of a ring of RING, a power of two; 0: the store holds whole sequences."""
    if RING > 0:
        at = at & (RING - 1)
    return at


def pad_dim(d: int) -> int:
    # Not triton.next_power_of_2, whose wrapper takes the host microseconds, many times a layer.
    return max(16, 1 << (d - 1).bit_length())


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
        tma: tiles come through tensor descriptors where the input allows it.
        registers: most of a thread, None for the compiler's choice.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


def key_descriptor(x: Tensor, keys: int, columns: int) -> TensorDescriptor | None:
    """Descriptor of tiles [keys, columns] over keys or values [rows, H, D]; None where their layout has none."""
    rows, heads, dim = x.shape
    if rows == 0 or x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 or (heads > 1 and x.stride(1) != dim):
        return None
    return TensorDescriptor(x, [rows, heads * dim], [x.stride(0), 1], [keys, columns])


def query_descriptor(x: Tensor, queries: int, group: int, columns: int) -> TensorDescriptor | None:
    """Descriptor of tiles [queries, group, columns] over [T, Hq, D]."""
    if queries & (queries - 1) or group & (group - 1) or x.data_ptr() % 16:
        return None
    if any(stride * x.element_size() % 16 for stride in x.stride()[:2]):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [queries, group, columns])


def exact(dtype: torch.dtype) -> bool:
    """Whether dots must be IEEE float32."""
    return dtype == torch.float32


def precision(dtype: torch.dtype) -> str:
    return "ieee" if exact(dtype) else "tf32"


def fit_rows(rows: int, group: int) -> int:
    """Rows of a tile that hold at least one query of the group."""
    return max(rows, triton.next_power_of_2(group))
