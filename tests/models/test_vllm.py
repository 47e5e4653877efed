"""vLLM's greedy tokens are the native engine's, token by token. Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy

vllm = pytest.importorskip("vllm")

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
NEW = 40


@pytest.fixture(params=["nsa", "full"])
def policy(request, tmp_path, monkeypatch) -> Policy:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.manual_seed(0)
    config = PolicyConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention=request.param,
        nsa=NSA,
        qk_norm=True,
        initializer_range=0.15,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    policy = Policy(config).eval()
    policy.save_pretrained(tmp_path / "policy")
    return policy


@torch.no_grad()
def native(policy: Policy, prompt: list[int]) -> list[int]:
    cache, slot = policy.new_cache(1, len(prompt) + NEW), torch.tensor([0])
    logits = policy.prefill(cache, slot, torch.tensor(prompt), torch.tensor([0, len(prompt)], dtype=torch.int32))
    tokens = []
    for _ in range(NEW):
        tokens.append(int(logits.argmax(-1)))
        logits = policy.decode(cache, slot, logits.argmax(-1))
    return tokens


def test_the_plug_in_is_found():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert "plumbline.models.vllm:register" in [entry.value for entry in found]


def test_a_page_of_compressed_keys_covers_more_tokens_with_as_many_bytes():
    from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from plumbline.models.vllm.specs import blocks_spec

    shape = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "head_size_v": 64, "dtype": torch.bfloat16}
    raw, compressed = FullAttentionSpec(**shape), blocks_spec(16, **shape)
    assert raw.page_size_bytes == 32 * 2 * (64 + 64) * 2 == 16 * compressed.page_size_bytes
    unified = unify_kv_cache_spec_page_size({"raw": raw, "compressed": compressed})
    assert {name: spec.block_size for name, spec in unified.items()} == {"raw": 32, "compressed": 512}
    assert unified["compressed"].page_size_bytes == unified["raw"].page_size_bytes == raw.page_size_bytes
    merged = compressed.merge([compressed, blocks_spec(16, **shape)])
    assert merged == compressed
    with pytest.raises(AssertionError):
        compressed.merge([compressed, blocks_spec(8, **shape)])


@pytest.mark.slow
def test_greedy_tokens_agree(policy, tmp_path):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 97, (n,), generator=generator).tolist() for n in (150, 3, 40, 77)]
    engine = vllm.LLM(
        model=str(tmp_path / "policy"),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=64,  # prompts are read in chunks, beside sequences that decode
        max_num_seqs=4,
        block_size=32,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    wanted = [native(policy, prompt) for prompt in prompts]
    for cached in (0, 128):  # the second time the longest prompt's first page of compressed keys is shared
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
        assert outputs[0].num_cached_tokens == cached
