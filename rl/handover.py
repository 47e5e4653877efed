"""Published weights, from the learner's process to the engines'.

An engine on a learner's machine maps a learner's copy of them (CUDA inter-process memory): that of the learner on its own
GPU, so that they cross from one part of the card's memory to another, or else one on another GPU, from which the card
reads them. To engines on other machines they go through Ray's object store.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def cards(device: str) -> dict[str, int]:
    """Numbers, by names that hold among all machines, of this process's GPU, then of others that it sees and whose memory
    its own can read; none if `device` is no GPU."""
    if torch.device(device).type != "cuda":
        return {}
    own = torch.device(device).index or 0
    others = [n for n in range(torch.cuda.device_count()) if n != own and torch.cuda.can_device_access_peer(own, n)]
    host = socket.gethostname()
    return {f"{host}/{torch.cuda.get_device_properties(number).uuid}": number for number in (own, *others)}


def see_also(gpus: Iterable[str]) -> None:
    """Let this process see more GPUs of its machine behind its own, to read from; only before it has looked at any.

    Ray shows an actor the GPUs that it has booked. `gpus` are entries of another actor's CUDA_VISIBLE_DEVICES.
    """
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own and not torch.cuda.is_initialized():
        more = [gpu for gpu in gpus if gpu and gpu not in own.split(",")]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join([own, *more])


@dataclass(frozen=True)
class Ticket:
    """Lets one process on the same machine map a Shelf, once.

    Attributes:
        card: that the shelf is on, as in `cards`; None: in the host's memory.
        rebuild, arguments: what torch.multiprocessing takes a tensor apart into.
        table: name and shape of each tensor in it, in order.
    """

    card: str | None
    rebuild: Any
    arguments: tuple[Any, ...]
    table: tuple[tuple[str, tuple[int, ...]], ...]

    def tensors(self) -> dict[str, Tensor]:
        """The weights where they lie, by name; to be read before the learner publishes again.

        The card may have another number in this process than in the learner's. RuntimeError if it is not seen here.
        """
        rebuild, arguments = self.rebuild, list(self.arguments)
        if self.card is not None:
            seen = cards("cuda:0")
            if self.card not in seen:
                raise RuntimeError(f"this process does not see the learner's GPU {self.card}, only {', '.join(seen)}")
            arguments[6] = seen[self.card]
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
        """For one process on the same machine; every one needs its own."""
        from torch.multiprocessing.reductions import reduce_tensor

        assert self.flat is not None
        rebuild, arguments = reduce_tensor(self.flat)
        return Ticket(next(iter(cards(str(self.flat.device))), None), rebuild, arguments, self.table)


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
