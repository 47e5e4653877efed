"""Configuration of the policy: one decoder for Llama, Qwen2/2.5, Qwen3 and SmolLM shapes."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from plumbline.kernels.nsa import NSAConfig

# `dynamic` turns every key by the length of its whole sequence once that exceeds max_position_embeddings, so a cache
# stops there (see Policy.new_cache). `longrope` has two sets of frequencies and no checkpoint of these families.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Architectures that load_policy understands, and what each adds to the common decoder.
ARCHITECTURES: dict[str, dict[str, bool]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


class PolicyConfig(PretrainedConfig):
    """Shape of a policy.

    Args:
        attention: `full`, or `nsa` with the settings of NSAConfig in `nsa`.
        qkv_bias: biases on the query, key and value projections (Qwen2).
        qk_norm: RMSNorm on each query and key head (Qwen3).
        rope_parameters: as transformers 5 has them: rope_theta, rope_type and the scaling's own settings.

    Raises:
        ValueError: attention, rope_type, head counts or NSA settings that do not fit.
    """

    model_type = "plumbline"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 160,
        intermediate_size: int = 448,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        attention: Literal["full", "nsa"] = "full",
        nsa: dict[str, Any] | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, **(rope_parameters or {})}
        if self.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"rope_type must be {', '.join(ROPE_TYPES)}, got {self.rope_parameters['rope_type']!r}")
        if self.rope_parameters.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(
                f"partial_rotary_factor={self.rope_parameters['partial_rotary_factor']} is not supported, only whole heads"
            )
        self.rms_norm_eps = rms_norm_eps
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if attention not in ("full", "nsa"):
            raise ValueError(f"attention must be full or nsa, got {attention!r}")
        self.attention = attention
        self.nsa = nsa or {}
        NSAConfig(**self.nsa)  # refuse settings that do not fit here, not in the first forward
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]

    @property
    def nsa_config(self) -> NSAConfig:
        return NSAConfig(**self.nsa)


def from_public(config: PretrainedConfig) -> PolicyConfig:
    """Our configuration of a public checkpoint's. ValueError for an architecture or a feature we do not have."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {kind!r}; supported: {', '.join([*ARCHITECTURES, 'plumbline'])}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"{kind} with hidden_act={config.hidden_act!r} is not supported, only silu")
    for feature in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if getattr(config, feature, None):
            raise ValueError(f"{kind} with {feature} is not supported")
    others = sorted({name for name in getattr(config, "layer_types", None) or [] if name != "full_attention"})
    if others:
        raise ValueError(f"{kind} with layer_types {', '.join(others)} is not supported, only full_attention")
    shared = [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ]
    values: dict[str, Any] = {name: getattr(config, name, None) for name in shared}
    head_dim = getattr(config, "head_dim", None)
    values |= ARCHITECTURES[kind]
    return PolicyConfig(head_dim=head_dim, rope_parameters=dict(config.rope_parameters), **values)


AutoConfig.register("plumbline", PolicyConfig)
