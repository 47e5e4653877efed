"""The policy: a decoder with full or Native Sparse Attention, for packed training, cached decoding and transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plumbline.kernels.nsa import Layout
from plumbline.models.attention import FullAttention, RMSNorm, SparseAttention
from plumbline.models.cache import PolicyCache
from plumbline.models.config import PolicyConfig


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SparseAttention(config) if config.attention == "nsa" else FullAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, store: Any = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, store)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, plan: Any) -> Tensor:
        x = x + self.self_attn.step(self.input_layernorm(x), cos, sin, cache, plan)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm, named as Llama checkpoints name them."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """transformers' convention: input_ids [B, L], padded on either side -> last_hidden_state [B, L, hidden]."""
        batch, length = input_ids.shape
        if attention_mask is None or bool(attention_mask[:, 0].all()):
            # Padding on the right cannot be seen by what comes before it.
            ends = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * length
            return BaseModelOutput(last_hidden_state=self.run(input_ids.flatten(), ends).view(batch, length, -1))
        real = attention_mask.bool()
        packed = self.run(input_ids[real], F.pad(real.sum(1).cumsum(0), (1, 0)).int())
        hidden = packed.new_zeros(batch, length, packed.shape[-1])
        hidden[real] = packed
        return BaseModelOutput(last_hidden_state=hidden)

    def run(self, input_ids: Tensor, cu_seqlens: Tensor, store: tuple[PolicyCache, Tensor] | None = None) -> Tensor:
        """Packed [T], [B+1] int32 -> [T, hidden] after the final norm; with a store (cache, slots), also fills it."""
        packed = Layout(cu_seqlens)
        if packed.tokens != input_ids.shape[0]:
            raise ValueError(f"cu_seqlens ends at {packed.tokens}, but there are {input_ids.shape[0]} input_ids")
        if packed.tokens == 0:
            return self.norm(self.embed_tokens(input_ids))
        # Sequences padded to one length (causality keeps padding out of them) make every layer's layout a view.
        ids = packed.pad(input_ids[:, None])[:, 0].flatten()
        batch, length = len(packed.lengths), packed.longest
        layout = packed if packed.uniform else Layout(torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * length)
        x = self.embed_tokens(ids)
        cos, sin = self.rope(x, torch.arange(length, device=ids.device).repeat(batch))
        for number, layer in enumerate(self.layers):
            kept = (store[0].layers[number], store[1]) if store is not None else None
            if self.gradient_checkpointing and self.training and kept is None:
                x = checkpoint(layer, x, cos, sin, layout, use_reentrant=False)
            else:
                x = layer(x, cos, sin, layout, kept)
        x = self.norm(x)
        return packed.unpad(x.view(batch, 1, length, -1)).squeeze(1)

    def step(self, cache: PolicyCache, slots: Tensor, tokens: Tensor) -> Tensor:
        """Append one token [B] to each slot [B]; returns [B, hidden] after the final norm."""
        plan = cache.plan(slots)
        x = self.embed_tokens(tokens)
        cos, sin = self.rope(x, plan.position)
        for layer, store in zip(self.layers, cache.layers, strict=True):
            x = layer.step(x, cos, sin, store, plan)
        cache.lengths[slots] += 1
        return self.norm(x)

    def rope(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, positions[None])
        return cos[0, :, None], sin[0, :, None]


class Policy(PreTrainedModel, GenerationMixin):
    """A causal language model that reads packed sequences.

    `policy(input_ids [T], cu_seqlens [B+1] int32) -> logits [T, vocab]`; with a 2-D input_ids it follows transformers'
    convention (attention_mask, labels) and returns CausalLMOutput.
    """

    config_class = PolicyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 (transformers' name and type)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, SparseAttention):
            module.reset_phi()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | CausalLMOutput:
        """Packed (1-D input_ids with cu_seqlens) -> logits [T, vocab]; 2-D input_ids -> CausalLMOutput.

        Raises ValueError for token ids or cu_seqlens that do not fit.
        """
        if input_ids.ndim == 1:
            if cu_seqlens is None:
                raise ValueError("packed input_ids [T] need cu_seqlens [B+1]")
            return self.lm_head(self.hidden_states(input_ids, cu_seqlens))
        logits = self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[T], [B+1] int32 -> [T, hidden] after the final norm."""
        return self.model.run(input_ids, cu_seqlens)

    def new_cache(self, slots: int, max_length: int) -> PolicyCache:
        return PolicyCache(self.config, slots, max_length, dtype=self.dtype, device=self.device)

    def prefill(self, cache: PolicyCache, slots: Tensor, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Read packed prompts into empty slots [B]; returns the logits [B, vocab] of each one's last token."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        if int(lengths.min()) < 1:
            raise ValueError("an empty prompt has no last token")
        hidden = self.model.run(input_ids, cu_seqlens, (cache, slots))
        cache.lengths[slots] = lengths
        return self.lm_head(hidden[cu_seqlens[1:].long() - 1])

    def decode(self, cache: PolicyCache, slots: Tensor, tokens: Tensor) -> Tensor:
        """Append one token [B] to each slot [B]; returns logits [B, vocab]."""
        return self.lm_head(self.model.step(cache, slots, tokens))


AutoModelForCausalLM.register(PolicyConfig, Policy)
