"""The policy: a decoder with full or Native Sparse Attention, for packed training, cached decoding and transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from plumbline.kernels.nsa import Layout
from plumbline.models.attention import FullAttention, RMSNorm, SparseAttention
from plumbline.models.cache import PolicyCache
from plumbline.models.config import PolicyConfig
from plumbline.models.generation import GenerationCache
from plumbline.models.rope import Rope

GROUP_TOKENS = 2048

# A cache to fill, and the slot of each sequence.
Store = tuple[PolicyCache, Tensor]


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

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        store: Any = None,
        replay: Tensor | None = None,
        record: Tensor | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, store, replay, record)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, plan: Any, record: Tensor | None = None) -> Tensor:
        x = x + self.self_attn.step(self.input_layernorm(x), cos, sin, cache, plan, record)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm, named as Llama checkpoints name them."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)
        self.gradient_checkpointing = False
        # Of the residual stream. None: the embedding's, which under autocast is the weights' float32.
        self.residual_dtype: torch.dtype | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """What transformers' trainers call on the base model: see read_batch."""
        return BaseModelOutput(self.read_batch(*args, **kwargs))  # type: ignore[arg-type]

    def read_batch(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: Any
    ) -> Tensor:
        """transformers' convention: input_ids [B, L], padded on either side -> hidden states [B, L, hidden].

        Without an attention_mask, position_ids that return to 0 inside a row start a new sequence there (the
        padding-free batches of transformers and TRL). Padding of a left-padded batch comes back as zeros.
        """
        batch, length = input_ids.shape
        if attention_mask is None and position_ids is not None:
            position_ids = position_ids.expand(batch, length)
            if bool((position_ids[:, 0] != 0).any()):
                raise ValueError("position_ids must start at 0 in every row; cached keys are not supported here")
            starts = (position_ids.flatten() == 0).nonzero().squeeze(1)
            ends = F.pad(starts, (0, 1), value=batch * length).int()
            return self.run(input_ids.flatten(), ends).view(batch, length, -1)
        if attention_mask is None or (
            bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()) and not self.rope.needs_lengths
        ):
            # Padding on the right cannot be seen by what comes before it.
            ends = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * length
            return self.run(input_ids.flatten(), ends).view(batch, length, -1)
        real = attention_mask.bool()
        packed = self.run(input_ids[real], F.pad(real.sum(1).cumsum(0), (1, 0)).int())
        hidden = packed.new_zeros(batch, length, packed.shape[-1])
        hidden[real] = packed
        return hidden

    def run(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        store: Store | None = None,
        *,
        replay: Tensor | None = None,
        record: Tensor | None = None,
    ) -> Tensor:
        """Packed [T], [B+1] int32 -> [T, hidden] after the final norm; with a store (cache, slots), also fills it.

        Args:
            replay: [T, layers, Hkv, count] int32, blocks that sparse attention takes instead of choosing.
            record: the same shape, filled with the blocks it took.
        """
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        tokens = sum(lengths)
        if tokens != input_ids.shape[0]:
            raise ValueError(f"cu_seqlens ends at {tokens}, but there are {input_ids.shape[0]} input_ids")
        if tokens == 0:
            return self.norm(self.embed_tokens(input_ids))
        groups = like_lengths(lengths)
        if len(groups) == 1 and len(groups[0]) == len(lengths):
            return self._run_padded(input_ids, Layout(cu_seqlens), store, replay, record)
        parts, rows = [], []
        for group in groups:
            members = torch.tensor(group, device=input_ids.device)
            layout = Layout(F.pad((cu_seqlens.diff()[members]).cumsum(0), (1, 0)).int())
            starts = (cu_seqlens[members].long() - layout.cu_seqlens[:-1].long()).repeat_interleave(layout.lengths)
            at = starts + torch.arange(layout.tokens, device=input_ids.device)
            taken = torch.empty_like(record[: layout.tokens]) if record is not None else None
            parts.append(
                self._run_padded(
                    input_ids[at],
                    layout,
                    (store[0], store[1][members]) if store else None,
                    replay[at] if replay is not None else None,
                    taken,
                )
            )
            if record is not None and taken is not None:
                record[at] = taken
            rows.append(at)
        back = torch.cat(rows).argsort()
        return torch.cat(parts)[back]

    def _run_padded(
        self, input_ids: Tensor, packed: Layout, store: Store | None, replay: Tensor | None, record: Tensor | None
    ) -> Tensor:
        # Sequences padded to one length (causality keeps padding out of them) make every layer's layout a view.
        ids = packed.pad(input_ids[:, None])[:, 0].flatten()
        batch, length = len(packed.lengths), packed.longest
        layout = (
            packed if packed.uniform else Layout(torch.arange(batch + 1, dtype=torch.int32, device=ids.device) * length)
        )
        x = self.embed_tokens(ids)
        if self.residual_dtype is not None:
            x = x.to(self.residual_dtype)
        positions = torch.arange(length, device=ids.device).repeat(batch)
        cos, sin = self.rope(positions, x.dtype, packed.lengths.repeat_interleave(length))
        if replay is not None:
            replay = pad_blocks(replay, packed)
        for number, layer in enumerate(self.layers):
            kept = (store[0].layers[number], store[1], packed.lengths) if store is not None else None
            blocks = replay[:, number].contiguous() if replay is not None else None
            if self.gradient_checkpointing and self.training and kept is None:
                x = checkpoint(layer, x, cos, sin, layout, None, blocks, use_reentrant=False)
            elif record is None:
                x = layer(x, cos, sin, layout, kept, blocks)
            else:
                taken = record.new_empty(batch * length, *record.shape[2:])
                x = layer(x, cos, sin, layout, kept, blocks, taken)
                record[:, number] = packed.unpad(taken.unflatten(0, (batch, length)).transpose(1, 2))
        x = self.norm(x)
        return packed.unpad(x.view(batch, 1, length, -1)).squeeze(1)

    def step(self, cache: PolicyCache, slots: Tensor, tokens: Tensor, record: Tensor | None = None) -> Tensor:
        """Append one token [B] to each slot [B]; returns [B, hidden] after the final norm.

        record [B, layers, Hkv, count] int32 takes the blocks that sparse attention chose.
        """
        plan = cache.plan(slots)
        x = self.embed_tokens(tokens)
        cos, sin = self.rope(plan.position, x.dtype)
        layer: Any
        for number, (layer, store) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x = layer.step(x, cos, sin, store, plan, None if record is None else record[:, number])
        cache.lengths[slots] += 1
        return self.norm(x)


def pad_blocks(replay: Tensor, packed: Layout) -> Tensor:
    """Blocks of packed tokens [T, layers, Hkv, count] -> of padded ones [B L, layers, Hkv, count]; padding takes block 0."""
    padded = packed.pad(replay.flatten(1, 2)).transpose(1, 2)  # [B, L, layers Hkv, count]
    nothing = torch.full_like(padded[0, 0], -1)
    nothing[:, 0] = 0
    padded = torch.where(packed.valid[:, :, None, None], padded, nothing)
    return padded.flatten(0, 1).unflatten(1, replay.shape[1:3])


def like_lengths(lengths: list[int]) -> list[list[int]]:
    """Sequence numbers in groups to be padded together, so that padding at most about doubles the tokens.

    Longest first; a sequence under half its group's longest opens a new group, if that spares GROUP_TOKENS or more of
    padding (what the overhead of one more pass through the layers is worth). Empty sequences are in no group.
    """
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        last = first
        while last < len(order) and 2 * lengths[order[last]] >= longest:
            last += 1
        if last < len(order) and (len(order) - last) * (longest - lengths[order[last]]) < GROUP_TOKENS:
            last = len(order)
        groups.append(sorted(order[first:last]))
        first = last
    return groups


class Policy(PreTrainedModel, GenerationMixin):
    """A causal language model that reads packed sequences.

    `policy(input_ids [T], cu_seqlens [B+1] int32) -> logits [T, vocab]`; with a 2-D input_ids it follows transformers'
    convention (attention_mask, labels) and returns CausalLMOutput.
    """

    config_class = PolicyConfig
    config: PolicyConfig
    model: Decoder
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

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: GenerationCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | CausalLMOutputWithPast:
        """Packed (1-D input_ids with cu_seqlens) -> logits [T, vocab]; 2-D input_ids -> CausalLMOutputWithPast.

        2-D input follows Decoder.read_batch. With past_key_values (`generate` makes it) input_ids holds all columns so
        far, and only the last one's logits [B, 1, vocab] come back. use_cache says nothing beyond that.

        Raises ValueError for cu_seqlens or position_ids that do not fit.
        """
        if input_ids.ndim == 1:
            if cu_seqlens is None:
                raise ValueError("packed input_ids [T] need cu_seqlens [B+1]")
            return self.lm_head(self.hidden_states(input_ids, cu_seqlens))
        if past_key_values is not None:
            logits = past_key_values.read(self, input_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # type: ignore[arg-type]
        logits = self.lm_head(self.model.read_batch(input_ids, attention_mask, position_ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """transformers' caches hold one pair of keys and values a layer; ours is made below."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *_: Any,
        past_key_values: GenerationCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **__: Any,
    ) -> dict[str, Any]:
        """One step of `generate`: cached unless use_cache=False, which reads the whole sequence for each token."""
        past = (past_key_values or GenerationCache()) if use_cache else None
        return {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past}

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Tensor, replay: Tensor | None = None) -> Tensor:
        """[T], [B+1] int32 -> [T, hidden] after the final norm.

        replay [T, layers, Hkv, count] int32: blocks that sparse attention takes instead of choosing (see new_record).
        """
        if replay is not None:
            wanted = (input_ids.shape[0], *self.new_record(0).shape[1:])
            if replay.shape != wanted:
                raise ValueError(
                    f"replay must be [tokens, layers, kv heads, count] = {list(wanted)}, got {list(replay.shape)}"
                )
        return self.model.run(input_ids, cu_seqlens, replay=replay)

    def new_record(self, tokens: int) -> Tensor:
        """[tokens, layers, Hkv, count] int32, to be filled with the blocks that sparse attention takes for each token.

        ValueError: full attention, which chooses none.
        """
        config = self.config
        if config.attention != "nsa":
            raise ValueError("full attention chooses no blocks that could be recorded or replayed")
        shape = (tokens, config.num_hidden_layers, config.num_key_value_heads, config.nsa_config.count)
        return torch.empty(shape, dtype=torch.int32, device=self.device)

    def new_cache(self, slots: int, max_length: int) -> PolicyCache:
        """Empty slots. ValueError: more tokens a slot than `dynamic` RoPE can decode (its keys turn with every token)."""
        trained = self.config.max_position_embeddings
        if self.model.rope.needs_lengths and max_length > trained:
            raise ValueError(
                f"rope_type dynamic cannot decode beyond max_position_embeddings ({trained}), asked for {max_length}"
            )
        return PolicyCache(self.config, slots, max_length, dtype=self.dtype, device=self.device)

    def prefill(
        self,
        cache: PolicyCache,
        slots: Tensor,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        record: Tensor | None = None,
    ) -> Tensor:
        """Read packed prompts into empty slots [B]; returns the logits [B, vocab] of each one's last token.

        record: new_record(T), filled.
        """
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        if int(lengths.min()) < 1:
            raise ValueError("an empty prompt has no last token")
        if int(lengths.max()) > cache.max_length:
            raise ValueError(f"a prompt of {int(lengths.max())} tokens does not fit a cache of {cache.max_length}")
        hidden = self.model.run(input_ids, cu_seqlens, (cache, slots), record=record)
        cache.lengths[slots] = lengths
        return self.lm_head(hidden[cu_seqlens[1:].long() - 1])

    def decode(self, cache: PolicyCache, slots: Tensor, tokens: Tensor, *, record: Tensor | None = None) -> Tensor:
        """Append one token [B] to each slot [B]; returns logits [B, vocab]. record: new_record(B), filled."""
        return self.lm_head(self.model.step(cache, slots, tokens, record))


AutoModelForCausalLM.register(PolicyConfig, Policy)
