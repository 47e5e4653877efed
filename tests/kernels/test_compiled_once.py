"""Batches of other lengths find kernels compiled: what Triton compiles for is the same in all.

Lengths differ in every batch of a training run; a kernel compiled for each would cost seconds a step.
"""

from __future__ import annotations

import inspect
from collections import defaultdict

import pytest
import torch

from plumbline.kernels.nsa import NSAConfig, PhiParams, native_sparse_attention

HEADS, KV_HEADS, DIM = 9, 3, 64


@pytest.fixture
def compiled(monkeypatch):
    """Kernels are not run; what each launch would be compiled for is collected by the kernel's name."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    found: dict[str, set[tuple]] = defaultdict(set)

    def record(kernel, *args, grid, warmup, **named):
        parameters = inspect.signature(kernel.fn).parameters
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        free = kernel.kwargs.get("do_not_specialize") or ()
        key = []
        for name, value in sorted(values.items()):
            # Beside the kernel's own there are the launch's: warps, stages, registers.
            if name not in parameters or "constexpr" in str(parameters[name].annotation):
                key.append((name, value))
            elif isinstance(value, torch.Tensor):
                key.append((name, value.dtype, value.data_ptr() % 16 == 0))
            elif not isinstance(value, int):
                key.append((name, type(value)))
            elif name not in free:
                key.append((name, value == 1, value % 16 == 0))
        found[kernel.fn.__name__].add(tuple(key))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    return found


def train(sizes: list[int]) -> None:
    ends = torch.tensor([0, *sizes]).cumsum(0).int()
    tokens = int(ends[-1])

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.bfloat16).requires_grad_()

    branches = [(leaf(tokens, KV_HEADS, DIM), leaf(tokens, KV_HEADS, DIM)) for _ in range(3)]
    shapes = [(KV_HEADS, 32, DIM, DIM), (KV_HEADS, 32, DIM)] * 2
    out = native_sparse_attention(
        leaf(tokens, HEADS, DIM), *branches, leaf(tokens, HEADS, 3), ends, PhiParams(*(leaf(*s) for s in shapes)),
        NSAConfig(), backend="triton",
    )  # fmt: skip
    out.sum().backward()


# Of at most as many tokens as selection reaches; of more; beyond where gradients of keys are cut into parts.
@pytest.mark.parametrize("longest", [450, 1500, 6000])
def test_other_lengths_need_no_other_triton_kernels(compiled, longest):
    generator = torch.Generator().manual_seed(0)
    first: dict[str, int] = {}
    for step in range(8):
        sizes = [longest - step, *torch.randint(longest // 3, longest // 2, (4,), generator=generator).tolist()]
        # Their sum is a multiple of 16 in one step of four.
        sizes[-1] += (5 if step % 4 else 0) - sum(sizes) % 16
        train(sizes)
        counts = {name: len(keys) for name, keys in compiled.items()}
        first = first or counts
        # Key tiles are as wide as a power of two that holds a sequence's blocks.
        counts.pop("choose", None)
        assert counts == {name: count for name, count in first.items() if name != "choose"}
    assert {"forward", "backward_keys", "backward_queries"} <= first.keys()
    assert first["forward"] == 3
