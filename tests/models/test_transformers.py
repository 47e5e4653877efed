"""transformers' `generate` and torch's autocast give what the packed float32 policy gives."""

from __future__ import annotations

import pytest
import torch

from plumbline.models import generation
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
ENDS = torch.tensor([0, 90, 97, 140], dtype=torch.int32)


@pytest.fixture(params=["full", "nsa"])
def policy(request) -> Policy:
    torch.manual_seed(0)
    config = PolicyConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        attention=request.param,
        nsa=NSA,
        qk_norm=True,
        initializer_range=0.15,
    )
    return Policy(config).eval()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(1))


def greedy(policy: Policy, prompt: torch.Tensor, count: int) -> list[int]:
    """Defined by the packed form alone."""
    for _ in range(count):
        logits = policy(prompt, torch.tensor([0, len(prompt)], dtype=torch.int32))
        prompt = torch.cat([prompt, logits[-1:].argmax(-1)])
    return prompt[-count:].tolist()


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Prompts of these lengths, padded on the left."""
    prompts = list(tokens(sum(lengths)).split(lengths))
    ids, mask = (torch.zeros(len(lengths), max(lengths), dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    return ids, mask, prompts


@pytest.mark.parametrize(
    ("lengths", "use_cache"),
    [([40, 3, 21], True), ([40, 3, 21], False), ([1, 3, 2], True)],
    ids=["long", "all", "short"],
)
@torch.no_grad()
def test_generate_is_greedy_decoding_of_each_prompt_alone(policy, lengths, use_cache, monkeypatch):
    monkeypatch.setattr(generation, "SPARE_TOKENS", 4)  # the cache has to grow; first one shorter than a window
    ids, mask, prompts = padded(lengths)
    out = policy.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None, use_cache=use_cache
    )
    assert out.shape == (3, ids.shape[1] + 20)
    for row, prompt in enumerate(prompts):
        assert out[row, -20:].tolist() == greedy(policy, prompt, 20)


@torch.no_grad()
def test_cached_generate_reads_each_token_once(policy, monkeypatch):
    read = []
    monkeypatch.setattr(policy, "prefill", lambda *a: read.append(len(a[2])) or Policy.prefill(policy, *a))
    monkeypatch.setattr(policy, "decode", lambda *a: read.append(len(a[2])) or Policy.decode(policy, *a))
    policy.generate(tokens(12)[None], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert read == [12, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@torch.no_grad()
def test_beams_and_samples_do_not_depend_on_the_cache(policy, how):
    ids, mask, _ = padded([30, 9])
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        how = {"do_sample": False, **how}
        outs.append(policy.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **how).tolist())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_stays_near_float32(policy, dtype):
    ids = tokens(140)
    exact = policy(ids, ENDS)
    with torch.autocast("cpu", dtype):
        half = policy(ids, ENDS)
        cache = policy.new_cache(1, 90)
        step = policy.prefill(cache, torch.tensor([0]), ids[:89], torch.tensor([0, 89], dtype=torch.int32))
        step = policy.decode(cache, torch.tensor([0]), ids[89:90])
    assert half.dtype == dtype
    spread = exact.std()
    limit = 0.04 if dtype == torch.bfloat16 else 0.005
    # The median: where two blocks score almost alike, rounding may choose the other one.
    assert (half.float() - exact).abs().mean(-1).median() < limit * spread
    assert (step[0].float() - exact[89]).abs().mean() < 3 * limit * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_under_autocast(policy, dtype, checkpointing):
    def gradients(enabled: bool) -> dict[str, torch.Tensor]:
        policy.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            logits = policy(tokens(140), ENDS)
        logits.float().logsumexp(-1).square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}

    policy.train()
    exact = gradients(False)
    if checkpointing:
        policy.gradient_checkpointing_enable()
    for name, gradient in gradients(True).items():
        assert gradient.dtype == torch.float32
        assert gradient.abs().sum() > 0, name
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0)
        assert cosine > 0.95 or exact[name].norm() < 1e-4, (name, cosine)
