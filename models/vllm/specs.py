"""The cache spec of compressed keys and values, in either of the forms that vLLM has had for it.

vLLM 0.29 and later have a field for it (`tokens_per_state`). Before, a spec says with `storage_block_size` how many entries
a page of `block_size` tokens holds; vLLM's own specs that do so are those of multi-head latent attention, which keep one
vector and no values, so ours extends the one of full attention. vLLM finds a subclass's cache manager, and the group that
it may join, through its base classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass(frozen=True, kw_only=True)
class BlocksSpec(FullAttentionSpec):
    """Full attention's pages with one entry each `stride` tokens, for vLLM 0.25 to 0.28."""

    stride: int = 1

    @property
    def storage_block_size(self) -> int:
        return self.block_size // self.stride

    @property
    def unpadded_page_size_bytes(self) -> int:
        entry = self.num_kv_heads * (self.head_size + self.head_size_v) * self.dtype.itemsize
        return self.storage_block_size * entry

    @property
    def real_page_size_bytes(self) -> int:
        """The name of unpadded_page_size_bytes in vLLM 0.25 and 0.26."""
        return self.unpadded_page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Full attention's merge makes a spec of the fields it knows; layers of one group are equal here."""
        return super(FullAttentionSpec, cls).merge(specs)


def blocks_spec(stride: int, **shape: Any) -> FullAttentionSpec:
    """Of keys and values with one entry each `stride` tokens; shape: the fields of a FullAttentionSpec."""
    if "tokens_per_state" in {field.name for field in fields(FullAttentionSpec)}:
        return FullAttentionSpec(**shape, tokens_per_state=stride)
    return BlocksSpec(**shape, stride=stride)
