"""The policy: packed, padded, cached and transformers' ways of calling it all give the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from plumbline.models import policy as policy_module
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy, like_lengths

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
LENGTHS = [37, 3, 90, 8, 61]


def make(attention: str, seed: int = 0, **changes) -> Policy:
    """A tiny policy with weights large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention": attention,
        "nsa": NSA,
        "qk_norm": True,
        "initializer_range": 0.15,
    }
    policy = Policy(PolicyConfig(**{**values, **changes}))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "phi" in name or "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return policy.eval()


def batch(lengths: list[int] = LENGTHS, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (sum(lengths),), generator=generator)
    return ids, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def alone(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    return policy(ids, torch.tensor([0, len(ids)], dtype=torch.int32))


@pytest.fixture(params=["full", "nsa"])
def policy(request) -> Policy:
    return make(request.param)


@pytest.mark.parametrize("group_tokens", [1, 10**9])
@torch.no_grad()
def test_packed_equals_each_sequence_alone(policy, monkeypatch, group_tokens):
    monkeypatch.setattr(policy_module, "GROUP_TOKENS", group_tokens)
    ids, ends = batch([37, 0, 3, 90, 8, 61])
    logits = policy(ids, ends)
    assert logits.shape == (len(ids), 61)
    for part, expected in zip(ids.split(ends.diff().tolist()), logits.split(ends.diff().tolist()), strict=True):
        if len(part):
            torch.testing.assert_close(alone(policy, part), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(policy):
    ids, _ = batch([90])
    changed = ids.clone()
    changed[70] = (changed[70] + 1) % 61
    before, after = alone(policy, ids), alone(policy, changed)
    torch.testing.assert_close(before[:70], after[:70])
    assert (before[70:] - after[70:]).abs().max() > 1e-2


@torch.no_grad()
def test_decode_equals_packed_token_by_token(policy):
    ids, ends = batch()
    whole = policy(ids, ends).split(LENGTHS)
    parts = ids.split(LENGTHS)
    prompts = [1, 2, 50, 8, 17]
    cache = policy.new_cache(slots=7, max_length=90)
    slots = torch.tensor([6, 0, 3, 2, 5])
    first = torch.cat([part[:n] for part, n in zip(parts, prompts, strict=True)])
    logits = policy.prefill(cache, slots, first, F.pad(torch.tensor(prompts).cumsum(0), (1, 0)).int())
    for i, n in enumerate(prompts):
        torch.testing.assert_close(logits[i], whole[i][n - 1], atol=1e-4, rtol=1e-4)
    done = list(prompts)
    while any(n < length for n, length in zip(done, LENGTHS, strict=True)):
        active = [i for i in range(5) if done[i] < LENGTHS[i]]
        logits = policy.decode(cache, slots[active], torch.stack([parts[i][done[i]] for i in active]))
        for row, i in enumerate(active):
            torch.testing.assert_close(logits[row], whole[i][done[i]], atol=1e-4, rtol=1e-4)
            done[i] += 1
    assert cache.lengths[slots].tolist() == LENGTHS


@torch.no_grad()
def test_slots_can_be_copied_and_used_again(policy):
    ids, _ = batch([40])
    whole = alone(policy, ids)
    cache = policy.new_cache(slots=3, max_length=40)
    slot = torch.tensor([1])
    policy.prefill(cache, slot, ids[:39].flip(0), torch.tensor([0, 39], dtype=torch.int32))
    cache.reset(slot)
    assert cache.lengths.tolist() == [0, 0, 0]
    policy.prefill(cache, slot, ids[:20], torch.tensor([0, 20], dtype=torch.int32))
    cache.copy(torch.tensor([1, 1]), torch.tensor([0, 2]))
    slots = torch.tensor([2, 0])
    for n in range(20, 40):
        logits = policy.decode(cache, slots, ids[n].repeat(2))
        torch.testing.assert_close(logits, whole[n].expand(2, -1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="does not fit a cache of 40"):
        policy.decode(cache, slots, ids[:2])


def test_bad_calls_are_refused_by_name(policy):
    ids, ends = batch()
    with pytest.raises(ValueError, match="cu_seqlens"):
        policy(ids)
    with pytest.raises(ValueError, match="cu_seqlens ends at 199, but there are 198 input_ids"):
        policy(ids[:-1], ends)
    with pytest.raises(ValueError, match="a prompt of 90 tokens does not fit a cache of 20"):
        policy.prefill(policy.new_cache(5, 20), torch.arange(5), ids, ends)
    with pytest.raises(ValueError, match="empty prompt"):
        policy.prefill(policy.new_cache(1, 20), torch.arange(1), ids[:0], torch.tensor([0, 0], dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention": "linear"}, "attention must be"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
        ({"num_attention_heads": 5}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"nsa": {"block": 8, "stride": 3}}, "stride"),
    ],
)
def test_bad_shapes_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        PolicyConfig(**changes)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_transformers_convention(policy, side):
    ids, ends = batch()
    wanted = policy(ids, ends).split(LENGTHS)
    padded, mask, labels = (torch.zeros(5, 90, dtype=torch.long) for _ in range(3))
    labels -= 100
    for row, part in enumerate(ids.split(LENGTHS)):
        where = slice(0, len(part)) if side == "right" else slice(90 - len(part), 90)
        padded[row, where], mask[row, where], labels[row, where] = part, 1, part
        labels[row, where.start] = -100  # nothing comes before the first token
    output = policy(input_ids=padded, attention_mask=mask, labels=labels)
    real = output.logits[mask.bool()].split(LENGTHS)
    for mine, expected in zip(real, wanted, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)
    losses = [
        F.cross_entropy(w[:-1], part[1:], reduction="sum") for w, part in zip(wanted, ids.split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(output.loss, sum(losses) / (len(ids) - 5), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_position_ids_mark_padding_free_sequences(policy):
    ids, ends = batch()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    output = policy(input_ids=ids[None], position_ids=positions[None])
    torch.testing.assert_close(output.logits[0], policy(ids, ends), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="position_ids must start at 0"):
        policy(input_ids=ids[None], position_ids=positions[None] + 1)


@torch.no_grad()
def test_saved_and_loaded_both_ways(policy, tmp_path):
    ids, ends = batch()
    policy.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PolicyConfig)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(auto, Policy)
    torch.testing.assert_close(auto(ids, ends), policy(ids, ends), atol=0, rtol=0)
    again = Policy.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again(ids, ends).dtype == torch.bfloat16


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    ids, ends = batch()
    policy(ids, ends).logsumexp(-1).square().mean().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def test_gradients_reach_everything_whatever_the_grouping_or_checkpointing(policy, monkeypatch):
    policy.train()
    plain = gradients(policy)
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in plain.values())
    monkeypatch.setattr(policy_module, "GROUP_TOKENS", 1)
    grouped = gradients(policy)
    policy.gradient_checkpointing_enable()
    assert policy.model.gradient_checkpointing
    recomputed = gradients(policy)
    for name, gradient in plain.items():
        torch.testing.assert_close(grouped[name], gradient, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(recomputed[name], grouped[name])


@torch.no_grad()
def test_casts_do_not_round_the_rotary_frequencies(policy):
    ids, ends = batch()
    there = copy.deepcopy(policy).to(torch.bfloat16)
    assert there(ids, ends).dtype == torch.bfloat16
    back = there.to(torch.float32)
    back.load_state_dict(policy.state_dict())
    torch.testing.assert_close(back(ids, ends), policy(ids, ends), atol=0, rtol=0)


@torch.no_grad()
def test_bfloat16_stays_near_float32(policy):
    ids, ends = batch()
    rough = copy.deepcopy(policy).to(torch.bfloat16)
    exact = rough.to(torch.float32)(ids, ends)
    half = rough.to(torch.bfloat16)(ids, ends).float()
    assert (half - exact).abs().mean() < 0.05 * exact.std()


def test_like_lengths_bounds_padding():
    assert like_lengths([50] * 4) == [[0, 1, 2, 3]]
    assert like_lengths([0, 5, 0]) == [[1]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = (10 ** (torch.rand(40, generator=generator) * 4)).long().tolist()
        groups = like_lengths(lengths)
        assert sorted(i for group in groups for i in group) == [i for i in range(40) if lengths[i]]
        padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
        assert padded <= 2 * sum(lengths) + policy_module.GROUP_TOKENS
    assert like_lengths([10_000, *[10] * 30]) == [[0], list(range(1, 31))]
