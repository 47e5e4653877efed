"""Decoding on a GPU: the state of every slot stays on the device, and a CUDA graph runs a whole step of many rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plumbline.kernels.decode import State, draw_tokens
from plumbline.models.cache import PolicyCache
from plumbline.models.policy import Policy
from plumbline.rl.batch import Sampling
from plumbline.rl.rollout.steps import DenseStep

# Rows of a captured step; a batch runs in the smallest that holds it.
WIDTHS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)


class Decoder:
    """Slots under way, their cache, and captured steps of several widths.

    Args:
        policy: in eval mode, without gradients.
        slots: sequences decoded at once.
        max_length: tokens of a slot, prompt and completion.
        limit: tokens of a completion at most.
        end_ids: tokens that end one.
        sampling: temperature is fixed for the life of a decoder; top_p must be 1.

    Raises:
        ValueError: top_p below 1, whose sort this sampler does not have.
    """

    def __init__(
        self, policy: Policy, slots: int, max_length: int, limit: int, end_ids: list[int], sampling: Sampling
    ) -> None:
        if sampling.top_p < 1:
            raise ValueError("the device sampler draws from the whole distribution; top_p must be 1")
        self.policy, self.slots, self.limit = policy, slots, limit
        self.temperature = sampling.temperature
        device = policy.device
        # One slot more, for ever finished: rows of a captured step beyond the batch point there.
        self.cache: PolicyCache = policy.new_cache(slots + 1, max_length)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.state = State(
            tokens=zeros(slots + 1),
            lengths=self.cache.lengths,
            counts=zeros(slots + 1),
            finished=torch.ones(slots + 1, dtype=torch.int32, device=device),
            keys=zeros(slots + 1),
            drawn=zeros(slots + 1, limit),
            logprobs=zeros(slots + 1, limit, dtype=torch.float32),
            end_ids=torch.tensor(end_ids, device=device),
        )
        self.step = DenseStep(policy)
        self.rows = {width: zeros(width) for width in WIDTHS if width < 2 * slots or width == WIDTHS[0]}
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # the graphs' memory: one pool, since they run one after the other

    def begin(self, slots: Tensor, keys: Tensor, logits: Tensor) -> None:
        """Slots [n] hold prompts that were read; logits [n, vocab] are those of their last tokens. Draws the first token."""
        state = self.state
        state.counts[slots] = 0
        state.finished[slots] = 0
        state.keys[slots] = keys
        draw_tokens(logits.contiguous(), slots, state, temperature=self.temperature, limit=self.limit, advance=False)

    def drawn(self, slots: list[int]) -> dict[int, list[int]]:
        """Token ids drawn so far in each of these slots."""
        where = torch.tensor(slots, device=self.policy.device)
        counts, rows = self.state.counts[where].tolist(), self.state.drawn[where].tolist()
        return {slot: row[:count] for slot, count, row in zip(slots, counts, rows, strict=True)}

    def advance(self, slots: list[int], steps: int) -> None:
        """`steps` more tokens for each of these slots; one that ends on the way stays as it is."""
        width = next((width for width in self.rows if width >= len(slots)), None)
        if width is None:
            for first in range(0, len(slots), WIDTHS[-1]):
                self.advance(slots[first : first + WIDTHS[-1]], steps)
            return
        filled = slots + [self.slots] * (width - len(slots))
        self.rows[width].copy_(torch.tensor(filled))
        if self.policy.device.type != "cuda":
            for _ in range(steps):
                self._step(width)
            return
        graph = self.graphs.get(width) or self._capture(width)
        for _ in range(steps):
            graph.replay()

    def _step(self, width: int) -> None:
        slots, state = self.rows[width], self.state
        logits = self.step(self.cache, slots, state.tokens[slots])
        draw_tokens(logits, slots, state, temperature=self.temperature, limit=self.limit, advance=True)

    def _capture(self, width: int) -> torch.cuda.CUDAGraph:
        """Warm up and capture on rows that are all finished: nothing real moves."""
        real = self.rows[width].clone()
        self.rows[width].fill_(self.slots)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._step(width)
        self.pool = self.pool or graph.pool()
        self.graphs[width] = graph
        self.rows[width].copy_(real)
        return graph

    def ended(self, slots: list[int]) -> list[tuple[int, list[int], list[float]]]:
        """(slot, token ids, log-probabilities) of those that are finished. Waits for the device."""
        flags = self.state.finished.tolist()
        done = [slot for slot in slots if flags[slot]]
        if not done:
            return []
        rows = torch.tensor(done, device=self.policy.device)
        counts = self.state.counts[rows].tolist()
        longest = max(counts)
        tokens = self.state.drawn[rows, :longest].tolist()
        logprobs = self.state.logprobs[rows, :longest].tolist()
        return [
            (slot, ids[:n], values[:n]) for slot, ids, values, n in zip(done, tokens, logprobs, counts, strict=True)
        ]
