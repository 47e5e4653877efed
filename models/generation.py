"""What transformers' `generate` carries from step to step: a slot cache that grows, one slot a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from plumbline.models.cache import PolicyCache
    from plumbline.models.policy import Policy

SPARE_TOKENS = 256


class GenerationCache:
    """Rows of a padded batch, each packed into a slot of its own.

    Attributes:
        seen: columns of input_ids already read.
        store: the slots; None before the first call.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.store: PolicyCache | None = None

    def get_seq_length(self) -> int:
        return self.seen

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search)."""
        if self.store is not None:
            self.store.copy(rows, torch.arange(len(rows), device=rows.device))

    def read(self, policy: Policy, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The columns not seen yet.

        Args:
            input_ids: [B, L] all columns so far, padding anywhere before the first new one.
            attention_mask: [B, L], or None if nothing is padding.

        Returns:
            logits [B, 1, vocab] of the last column.
        """
        batch, length = input_ids.shape
        slots = torch.arange(batch, device=input_ids.device)
        if self.store is None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            real = real.bool()
            counts = real.sum(1)
            self.store = policy.new_cache(batch, self._room(policy, int(counts.max()) + 1))
            logits = policy.prefill(self.store, slots, input_ids[real], F.pad(counts.cumsum(0), (1, 0)).int())
        elif self.seen < length:
            for column in range(self.seen, length):
                self._grow(policy)
                logits = policy.decode(self.store, slots, input_ids[:, column])
        else:
            raise ValueError("generate asked for a column again that the cache has read; call it with use_cache=False")
        self.seen = length
        return logits[:, None]

    def _grow(self, policy: Policy) -> None:
        old = self.store
        assert old is not None
        needed = int(old.lengths.max()) + 1
        if needed <= old.max_length:
            return
        self.store = policy.new_cache(len(old.lengths), self._room(policy, 2 * needed))
        self.store.lengths.copy_(old.lengths)
        for new_layer, layer in zip(self.store.layers, old.layers, strict=True):
            for new, tensor in zip(new_layer.tensors(), layer.tensors(), strict=True):
                # A ring grows only while it is shorter than its places, and then no token has gone round it.
                new[:, :, : tensor.shape[2]] = tensor

    @staticmethod
    def _room(policy: Policy, tokens: int) -> int:
        """Tokens a slot: a multiple of SPARE_TOKENS, unless `dynamic` RoPE sets an earlier end."""
        room = -(-tokens // SPARE_TOKENS) * SPARE_TOKENS
        trained = policy.config.max_position_embeddings
        return max(tokens, min(room, trained)) if policy.model.rope.needs_lengths else room
