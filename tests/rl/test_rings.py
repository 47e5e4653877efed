"""Rollout over caches that keep of the window and the compressed branch's raw keys no more than steps still read.

Every log-probability is held to the forward pass: prompts shorter than the rings, as long and longer, read in one batch,
copied to a group's slots, decoded far beyond the rings, in slots that held longer sequences before.
"""

from functools import partial

import pytest
import torch

from plumbline.models.cache import PolicyCache
from plumbline.models.config import PolicyConfig
from plumbline.models.load import policy_config
from plumbline.models.policy import Policy
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.config import parse_config
from plumbline.rl.plan import make_plan
from plumbline.rl.rollout import graphed, steps
from plumbline.rl.rollout.graphed import Decoder
from plumbline.rl.rollout.native import NativeEngine

# Rings of 4 and 8 places, of 16 and 16, of 8 and 1; then windows beyond every sequence.
SHAPES = {
    "small": {"block": 4, "stride": 2, "select_block": 4, "count": 4, "window": 6},
    "over": {"block": 9, "stride": 3, "select_block": 6, "count": 4, "window": 9, "phi": "mlp"},
    "one": {"block": 8, "stride": 8, "select_block": 8, "count": 3, "local": 1, "window": 1, "phi": "mean"},
    "wide": {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 300},
}
LENGTHS = [17, 1, 8, 40, 9, 3, 16]
VOCAB = 53


class PlainCodec:
    """Token ids are their own text."""

    end_ids = frozenset({7})

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


def make_policy(nsa, layers=2) -> Policy:
    torch.manual_seed(0)
    policy = Policy(
        PolicyConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            attention="nsa",
            nsa=nsa,
            initializer_range=0.25,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    for name, parameter in policy.named_parameters():
        if "bias" in name or "norm" in name or "phi" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return policy.float().eval().requires_grad_(False)


def forward_logprobs(policy, prompt, token_ids):
    """By definition: one pass over the whole sequence."""
    ids = torch.tensor([*prompt, *token_ids])
    with torch.no_grad():
        logits = policy(ids, torch.tensor([0, len(ids)], dtype=torch.int32))[len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("carried", [False, True], ids=["one policy", "new weights"])
def test_logprobs_are_the_forward_pass(name, carried, tmp_path):
    make_policy(SHAPES[name]).save_pretrained(tmp_path)
    # Fewer slots than sequences: they are used again, after longer sequences and after shorter ones.
    engine = NativeEngine(str(tmp_path), attention=None, codec=PlainCodec(), slots=9, device="cpu")
    old, new = make_policy(SHAPES[name]), make_policy(SHAPES[name])
    for parameter in new.parameters():
        parameter.mul_(1.2)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(i, str(i), torch.randint(8, VOCAB, (n,), generator=generator).tolist(), "", "")
        for i, n in enumerate(LENGTHS)
    ]
    groups = []
    for pause, group in enumerate(engine.generate_in_parts(prompts, 3, Sampling(45, seed=3))):
        groups += [group] if group is not None else []
        if carried and pause == 20:
            engine.load_weights(5, dict(new.named_parameters()))
    assert sorted(group.prompt.index for group in groups) == list(range(len(LENGTHS)))
    longest = switched = 0
    for group in groups:
        for completion in group.completions:
            switch = next((first for first, version in completion.versions if version == 5), len(completion.token_ids))
            by_old, by_new = (forward_logprobs(p, group.prompt.token_ids, completion.token_ids) for p in (old, new))
            want = torch.cat([by_old[:switch], by_new[switch:]])
            torch.testing.assert_close(torch.tensor(completion.logprobs), want, rtol=1e-4, atol=1e-4)
            longest = max(longest, len(completion.token_ids))
            switched += 0 < switch < len(completion.token_ids)
    assert longest > 35
    assert switched >= 3 * carried


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels here")
@pytest.mark.parametrize("name", ["small", "over"])
@torch.no_grad()
def test_triton_steps_of_copied_and_reused_slots(name, monkeypatch):
    """The captured step, kernel by kernel, in the slots of two groups: prompts longer than the rings, then shorter."""
    monkeypatch.setattr(steps, "decode_step", partial(steps.decode_step, backend="triton"))
    monkeypatch.setattr(graphed, "WIDTHS", (4,))
    policy = make_policy(SHAPES[name], layers=1)
    decoder = Decoder(policy, 4, 48, 9, [VOCAB], Sampling(9))
    generator = torch.Generator().manual_seed(2)
    for round_number, lengths in enumerate(([34, 7], [2, 16])):
        prompts = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
        firsts, copies = torch.tensor([0, 2]), torch.tensor([1, 3])
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        logits = policy.prefill(decoder.cache, firsts, torch.cat(prompts), ends)
        decoder.cache.copy(firsts, copies)
        keys = torch.arange(4) + 10 * round_number
        decoder.begin(torch.arange(4), keys, logits.repeat_interleave(2, 0))
        decoder.advance([0, 1, 2, 3], 8)
        ended = decoder.ended([0, 1, 2, 3])
        assert [slot for slot, _, _ in ended] == [0, 1, 2, 3]
        assert ended[0][1] != ended[1][1]  # drawn apart, so that slots of a group differ from here on
        for slot, token_ids, logprobs in ended:
            want = forward_logprobs(policy, prompts[slot // 2].tolist(), token_ids)
            torch.testing.assert_close(torch.tensor(logprobs), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["full", "nsa"])
def test_the_plan_counts_what_a_cache_takes(attention, tmp_path):
    policy = make_policy(SHAPES["small"])
    policy.config.attention = attention
    policy.config.save_pretrained(tmp_path)
    config = parse_config({"name": "x", "steps": 1, "policy": {"path": str(tmp_path), "device": "cpu"}})
    plan = make_plan(config)
    shape = policy_config(str(tmp_path), attention=None)
    assert shape.attention == attention
    longest = config.prompt.max_tokens + config.rollout.max_new_tokens
    cache = PolicyCache(shape, config.rollout.slots, longest, dtype=torch.float32, device="meta")
    taken = sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors())
    assert plan.rollout == 4 * plan.parameters + taken
