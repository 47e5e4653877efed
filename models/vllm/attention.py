"""How vLLM carries Native Sparse Attention: what a layer keeps, in which cache groups, and what it is told each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from plumbline.kernels.nsa.backend import Backend, use_triton
from plumbline.models.attention import SparseAttention
from plumbline.models.vllm.decode import Part, divide
from plumbline.models.vllm.specs import blocks_spec

STORES = ("cmp", "slc", "win", "blocks")


@dataclass
class StepMetadata:
    """One cache group's view of a step.

    Attributes:
        starts: first new token of each sequence, and the end.
        lengths: [B] int, tokens of each sequence after the step, on the device.
        longest: a bound on them, known to the host.
        table: [B, M] int32 block table.
        work: what the step does, made by the first layer for all.
    """

    starts: list[int]
    lengths: Tensor
    longest: int
    table: Tensor
    work: list[Part] = field(default_factory=list)


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """From vLLM's metadata to ours.

    Where all sequences have one new token and the decode kernels run, nothing is read on the host, so a CUDA graph can
    hold the step; `--additional-config '{"nsa_graphs": false}'` keeps graphs to the other layers' work.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        asked = vllm_config.additional_config
        if isinstance(asked, dict) and asked.get("nsa_graphs") is False:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        common = common_attn_metadata
        return StepMetadata(
            common.query_start_loc_cpu[: common.num_reqs + 1].tolist(),
            common.seq_lens[: common.num_reqs],
            common.max_seq_len,
            common.block_table_tensor[: common.num_reqs],
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> StepMetadata:
        told = self.build(0, common_attn_metadata)
        told.longest = self.vllm_config.model_config.max_model_len  # of any step that is to run in the graph
        return told


class SparseBackend(AttentionBackend):
    """Names the metadata builder; the layer itself attends (PagedSparseAttention)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "PLUMBLINE_NSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layer attends by itself")

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """vLLM before 0.29 asks for the shape of the pages; later ones always are [page, head, entry, content]."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size


class Store(nn.Module, AttentionLayerBase):
    """One of a layer's four stores, as vLLM's cache manager sees it: a layer of its own with a cache spec of its own.

    | store | spec | keeps |
    |---|---|---|
    | slc | full attention | every token |
    | win | sliding window w | the last w tokens |
    | cmp | sliding window l | the tokens of the compression block under way |
    | blocks | full attention, d tokens a state | every compressed block |

    vLLM gives layers of one spec one cache group. Pages are made equal in bytes, so a page of `blocks` covers d times the
    tokens of a page of `slc`.
    """

    def __init__(self, kind: str, attention: SparseAttention, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.kind, self.config, self.name = kind, attention.nsa, f"{prefix}.{kind}"
        self.heads, self.dim = attention.kv_heads, attention.dim
        self.kv_cache = torch.tensor([])
        layers = vllm_config.compilation_config.static_forward_context
        if self.name in layers:
            raise ValueError(f"two layers are called {self.name}")
        layers[self.name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SparseBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        cache = vllm_config.cache_config
        size = cache.block_size
        if size % self.config.stride:
            raise ValueError(f"block_size ({size}) must be a multiple of the compression stride ({self.config.stride})")
        shape: dict[str, Any] = {
            "block_size": size,
            "num_kv_heads": self.heads,
            "head_size": self.dim,
            "head_size_v": self.dim,
            "dtype": vllm_config.model_config.dtype,
        }
        if self.kind == "slc":
            return FullAttentionSpec(**shape)
        if self.kind == "blocks":
            return blocks_spec(self.config.stride, **shape)
        return SlidingWindowSpec(
            **shape, sliding_window=self.config.window if self.kind == "win" else self.config.block
        )


class PagedSparseAttention(nn.Module):
    """A layer's sparse attention on vLLM's pages.

    Args:
        attention: the policy's own module: projections, gates and phi.
        vllm_config: where the stores are registered.
        prefix: of their names.
        first: this is the layer that divides a step's work for all.
    """

    backend: Backend = "auto"

    def __init__(self, attention: SparseAttention, vllm_config: VllmConfig, prefix: str, *, first: bool) -> None:
        super().__init__()
        self.stores = {kind: Store(kind, attention, vllm_config, prefix) for kind in STORES}
        self.first = first

    def forward(self, attention: SparseAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, hidden] of the step's new tokens (and padding after them) -> [T, hidden]."""
        told = get_forward_context().attn_metadata
        out = x.new_zeros(x.shape[0], attention.heads * attention.dim)
        if told is None:  # vLLM's dry run, which measures memory
            return attention.o_proj(out)
        metadata = {kind: told[store.name] for kind, store in self.stores.items()}
        owner = metadata["slc"]
        tokens = owner.starts[-1]
        x, cos, sin = (part[:tokens] for part in (x, cos, sin))
        q, branches = attention.project(x, cos, sin)
        gates, phi = attention.gates(x), attention.phi(q.dtype)
        if self.first or not owner.work:
            page = self.stores["slc"].kv_cache.shape[2]
            kernels = use_triton(self.backend, q, attention.nsa.select_block)
            tables = {kind: group.table for kind, group in metadata.items()}
            owner.work = divide(owner.starts, owner.lengths, owner.longest, tables, attention.nsa, page, kernels)
        stores = {kind: store.kv_cache for kind, store in self.stores.items()}
        for part in owner.work:
            out[:tokens][part.rows] = part.attend(q, *branches, gates, stores, phi).flatten(1)
        return attention.o_proj(out)
