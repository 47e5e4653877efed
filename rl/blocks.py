"""The blocks that sparse attention chose in rollout, packed to travel with a completion and replayed by the learner.

A query with at most `count` candidates takes them all, and the forced ones are always the first and the last of a query's
blocks: neither is stored. What is left takes layers x kv heads x (count - initial - local) numbers a token, of one byte
each up to 256 blocks, two up to 65,536, else four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plumbline.models.config import PolicyConfig

WIDTHS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class BlockCodec:
    """Between block indices [n, layers, Hkv, count] int32 and bytes.

    Args:
        config: of the policy. ValueError if it has full attention.

    Attributes:
        first: first position whose blocks are stored.
    """

    def __init__(self, config: PolicyConfig) -> None:
        if config.attention != "nsa":
            raise ValueError("full attention chooses no blocks that could be recorded or replayed")
        self.nsa = config.nsa_config
        self.first = self.nsa.count * self.nsa.select_block
        self.shape = (config.num_hidden_layers, config.num_key_value_heads)
        self.free = slice(self.nsa.initial, self.nsa.count - self.nsa.local)

    def pack(self, blocks: Tensor) -> bytes:
        """Blocks of the positions from `first` on, [n, layers, Hkv, count]; the first byte says how wide a number is."""
        chosen = blocks[..., self.free].cpu().numpy()
        if chosen.size == 0:
            return b""
        if chosen.min() < 0:
            raise ValueError(f"a query from position {self.first} on has {self.nsa.count} blocks, one here has fewer")
        width = next(width for width, kind in WIDTHS.items() if chosen.max() <= np.iinfo(kind).max)
        return bytes([width]) + chosen.astype(WIDTHS[width]).tobytes()

    def unpack(self, data: bytes, tokens: int) -> Tensor:
        """[tokens, layers, Hkv, count] int32 of positions 0 to tokens - 1.

        Raises:
            ValueError: the bytes are of another number of tokens, or of another policy.
        """
        nsa, stored = self.nsa, max(0, tokens - self.first)
        own = torch.arange(tokens) // nsa.select_block
        slot = torch.arange(nsa.count)
        # All candidates; and beyond `first` the forced ones, the rest to be filled in.
        few = torch.where(slot <= own[:, None], slot, -1)
        local = own[:, None] - (nsa.count - 1 - slot)
        blocks = torch.where(own[:, None] < nsa.count, few, torch.where(slot < nsa.initial, slot, local)).int()
        blocks = blocks[:, None, None].expand(-1, *self.shape, -1).contiguous()
        free = blocks[self.first :, ..., self.free]
        kind = WIDTHS[data[0]] if data and data[0] in WIDTHS else np.uint8
        if len(data) != (free.numel() * np.dtype(kind).itemsize + 1 if free.numel() else 0):
            raise ValueError(f"{len(data)} bytes of blocks are not those of {stored} tokens of this policy")
        if data:
            chosen = np.frombuffer(data, kind, offset=1).astype(np.int32)
            free.copy_(torch.from_numpy(chosen).view(free.shape))
        return blocks
