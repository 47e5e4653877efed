"""Our policy as a vLLM model: the same modules and weights, with attention from vLLM's pages."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from plumbline.models.attention import FullAttention, SparseAttention
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Decoder, Layer
from plumbline.models.vllm.attention import PagedSparseAttention


class PagedFullAttention(nn.Module):
    """A layer's full attention by vLLM's own kernels."""

    def __init__(self, attention: FullAttention, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attend = Attention(
            attention.heads,
            attention.dim,
            attention.dim**-0.5,
            num_kv_heads=attention.kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, attention: FullAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        q, [(k, v)] = attention.project(x, cos, sin)
        return attention.o_proj(self.attend(q.flatten(1), k.flatten(1), v.flatten(1)))


class ServedPolicy(nn.Module):
    """What vLLM asks of a text model.

    Raises:
        ValueError: a vLLM setting that has no counterpart here, by name.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, PolicyConfig)
        refuse_unsupported(vllm_config, config)
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.paged = nn.ModuleList()
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer)
            name, attention = f"{prefix}model.layers.{number}.self_attn", layer.self_attn
            if isinstance(attention, SparseAttention):
                self.paged.append(PagedSparseAttention(attention, vllm_config, name, first=number == 0))
            else:
                self.paged.append(PagedFullAttention(attention, vllm_config, name))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids, positions [T] of the step's new tokens -> hidden states [T, hidden] after the final norm."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        x = inputs_embeds
        cos, sin = self.model.rope(positions, x.dtype)
        for layer, paged in zip(self.model.layers, self.paged, strict=True):
            assert isinstance(layer, Layer)
            x = x + paged(layer.self_attn, layer.input_layernorm(x), cos, sin)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    def refuse_others(self, tensors: dict[str, Tensor]) -> None:
        """ValueError unless names and shapes are exactly the policy's: a reload that stops half way leaves no model behind."""
        own = dict(self.named_parameters())
        if own.keys() != tensors.keys():
            raise ValueError(f"weights of another policy: {sorted(own.keys() ^ tensors.keys())[:3]}")
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"weights of another shape: {name} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
                )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy tensors, named as in our checkpoints, in place; returns their names. ValueError: one that does not fit.

        While vLLM reloads weights, parameters are on the meta device, and only their `weight_loader`s put anything
        into the tensors that are used.
        """
        own = dict(self.named_parameters(remove_duplicate=False))
        loaded = set()
        with torch.no_grad():
            for name, tensor in weights:
                tied = self.config.tie_word_embeddings
                if tied and name == "lm_head.weight":
                    continue
                if name not in own:
                    raise ValueError(f"the policy has no tensor {name}")
                if own[name].shape != tensor.shape:
                    raise ValueError(f"{name} is {list(tensor.shape)}, the policy's {list(own[name].shape)}")
                # One tensor under two names: a reload waits for both.
                for target in (name, "lm_head.weight") if tied and name == "model.embed_tokens.weight" else (name,):
                    getattr(own[target], "weight_loader", default_weight_loader)(own[target], tensor)
                loaded.add(name)
        return loaded


def refuse_unsupported(vllm_config: VllmConfig, config: PolicyConfig) -> None:
    """ValueError for what this model would do wrongly or not at all."""
    parallel = vllm_config.parallel_config
    reasons = {
        "tensor_parallel_size": parallel.tensor_parallel_size > 1,
        "pipeline_parallel_size": parallel.pipeline_parallel_size > 1,
        "decode_context_parallel_size": parallel.decode_context_parallel_size > 1,
        "quantization": vllm_config.quant_config is not None,
        "enable_lora": vllm_config.lora_config is not None,
        "speculative_config": vllm_config.speculative_config is not None,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
    }
    if config.attention == "nsa":
        reasons["VLLM_USE_BREAKABLE_CUDAGRAPH"] = os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0")
        reasons["kv_cache_dtype"] = vllm_config.cache_config.cache_dtype != "auto"
    named = [name for name, refused in reasons.items() if refused]
    if named:
        raise ValueError(f"a plumbline policy does not run in vLLM with {', '.join(named)}; leave it at its default")
    trained = config.max_position_embeddings
    if config.rope_parameters["rope_type"] == "dynamic" and vllm_config.model_config.max_model_len > trained:
        raise ValueError(
            f"rope_type dynamic cannot decode beyond max_position_embeddings ({trained}); lower max_model_len"
        )
