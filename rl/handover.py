"""Published weights, from the learner's process to the engines'.

An engine on the learner's own GPU maps the learner's copy of them (CUDA inter-process memory), so that they cross from
one part of the card's memory to another. To every other engine they go through Ray's object store.
"""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def card(device: str) -> str | None:
    """What names this GPU among those of all machines; None if `device` is not one."""
    if torch.device(device).type != "cuda":
        return None
    return f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"


@dataclass(frozen=True)
class Ticket:
    """Lets one process on the same card map a Shelf, once.

    Attributes:
        rebuild, arguments: what torch.multiprocessing takes a tensor apart into.
        table: name and shape of each tensor in it, in order.
    """

    rebuild: Any
    arguments: tuple[Any, ...]
    table: tuple[tuple[str, tuple[int, ...]], ...]

    def tensors(self) -> dict[str, Tensor]:
        """The weights where they lie, by name; to be read before the learner publishes again.

        The card has another number in this process than in the learner's if they see different ones.
        """
        rebuild, arguments = self.rebuild, list(self.arguments)
        if arguments and torch.cuda.is_available():
            arguments[6] = torch.cuda.current_device()
        return _views(rebuild(*arguments), self.table)


class Shelf:
    """One flat tensor on the learner's device that holds what was published last.

    Args:
        dtype: of the engines' weights.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.table: tuple[tuple[str, tuple[int, ...]], ...] = ()
        self.flat: Tensor | None = None

    @torch.no_grad()
    def put(self, weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Copy them in, in this dtype.

        Args:
            weights: names and tensors, all on one device.
            shapes: of all of them; their order is that of the shelf.
        """
        views: dict[str, Tensor] = {}
        for name, tensor in weights:
            if not views:
                self._make_room(tuple(shapes.items()), tensor.device)
                views = self.tensors()
            views[name].copy_(tensor)
        assert self.flat is not None
        if self.flat.is_cuda:
            torch.cuda.synchronize(self.flat.device)  # other processes' streams do not wait for this one's

    def _make_room(self, table: tuple[tuple[str, tuple[int, ...]], ...], device: torch.device) -> None:
        if self.flat is None or table != self.table:
            self.flat = torch.empty(sum(math.prod(shape) for _, shape in table), dtype=self.dtype, device=device)
            self.table = table

    def tensors(self) -> dict[str, Tensor]:
        """Views by name."""
        assert self.flat is not None
        return _views(self.flat, self.table)

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies on the host; bfloat16, which NumPy does not have, as the integers of its bits."""
        half = self.dtype == torch.bfloat16
        return {name: (t.view(torch.int16) if half else t).cpu().numpy() for name, t in self.tensors().items()}

    def ticket(self) -> Ticket:
        """For one process on the same card; every one needs its own."""
        from torch.multiprocessing.reductions import reduce_tensor

        assert self.flat is not None
        rebuild, arguments = reduce_tensor(self.flat)
        return Ticket(rebuild, arguments, self.table)


def from_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """What Shelf.arrays made, as tensors over the same memory."""
    with warnings.catch_warnings():
        # The arrays are read-only views of the object store; they are copied from, never written.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: t.view(torch.bfloat16) if t.dtype == torch.int16 else t for name, t in tensors.items()}


def _views(flat: Tensor, table: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, Tensor]:
    sizes = [torch.Size(shape).numel() for _, shape in table]
    parts = flat.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(table, parts, strict=True)}
