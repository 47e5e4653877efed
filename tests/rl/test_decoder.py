"""The decoder whose steps CUDA captures, launched kernel by kernel on the CPU (Triton's interpreter), with sparse attention.

What a graph needs is checked here too: a step does the same operations on the same shapes whatever the lengths, and asks
the device for nothing. tests/gpu captures it.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plumbline.kernels.decode import pointwise
from plumbline.kernels.nsa.triton_backend import decode
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.batch import Sampling
from plumbline.rl.rollout import graphed, steps
from plumbline.rl.rollout.graphed import Decoder
from plumbline.rl.rollout.steps import SparseStep

NSA = {"block": 4, "stride": 2, "select_block": 4, "count": 4, "window": 6}
SLOTS, LONGEST, LIMIT = 3, 48, 4
PROMPTS = [33, 5, 18]
# Operations that make the host wait for the device, or whose result's shape hangs on what is in a tensor.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "is_nonzero",
}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels here")


class Operations(TorchDispatchMode):
    """Writes down every operation with the shapes of what it returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else (result,)
        self.seen.append((func._opname, *(tuple(x.shape) for x in found if isinstance(x, torch.Tensor))))
        return result


def make_policy(**changes) -> Policy:
    """Random, also where a fresh policy is not: biases, norms and phi."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention": "nsa",
        "nsa": NSA,
        "initializer_range": 0.25,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    policy = Policy(PolicyConfig(**shape | changes)).float().eval().requires_grad_(False)
    for name, parameter in policy.named_parameters():
        if "bias" in name or "norm" in name or "phi" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(steps, "decode_step", partial(steps.decode_step, backend="triton"))
    monkeypatch.setattr(graphed, "WIDTHS", (4,))  # the interpreter takes its time for every row


@pytest.fixture
def policy(kernels) -> Policy:
    return make_policy()


def begun(policy, temperature, end_ids):
    """A decoder whose slots hold prompts of unlike lengths, and those prompts."""
    decoder = Decoder(policy, SLOTS, LONGEST, LIMIT, end_ids, Sampling(LIMIT, temperature))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 53, (n,), generator=generator) for n in PROMPTS]
    ends = torch.tensor([0, *PROMPTS]).cumsum(0).int()
    slots = torch.arange(SLOTS)
    decoder.begin(slots, 100 + slots, policy.prefill(decoder.cache, slots, torch.cat(prompts), ends))
    return decoder, prompts


def test_its_logprobs_are_the_forward_pass(policy):
    """One step more than there are tokens to draw: what is finished stays as it is."""
    temperature = 0.8
    decoder, prompts = begun(policy, temperature, [7])
    decoder.advance(list(range(SLOTS)), LIMIT)
    ended = decoder.ended(list(range(SLOTS)))
    assert [slot for slot, _, _ in ended] == [0, 1, 2]
    for slot, token_ids, logprobs in ended:
        assert len(token_ids) == LIMIT or token_ids[-1] == 7
        assert 7 not in token_ids[:-1]
        ids = torch.cat([prompts[slot], torch.tensor(token_ids)])
        logits = policy(ids, torch.tensor([0, len(ids)], dtype=torch.int32))[len(prompts[slot]) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), want, atol=1e-4, rtol=1e-4)


def test_a_step_is_the_same_at_any_length_and_waits_for_nothing(policy, monkeypatch):
    decoder, _ = begun(policy, 1.0, [7])
    step = SparseStep(policy)
    # Kernels are left out: what they read is on the device anyway, and the interpreter has operations of its own.
    leave_out_kernels(monkeypatch)
    logs = []
    for lengths in ([33, 5, 18], [0, 0, 0], [47, 3, 7]):
        decoder.cache.lengths[:SLOTS] = torch.tensor(lengths)
        with Operations() as log:
            step(decoder.cache, decoder.rows[4], decoder.state.tokens[decoder.rows[4]])
        logs.append(log.seen)
    assert logs[0] == logs[1] == logs[2]
    assert {name for name, *_ in logs[0]} & WAITING == set()
    # The step that is not captured does wait, or this test would see nothing.
    with Operations() as log:
        policy.decode(decoder.cache, torch.arange(SLOTS), torch.zeros(SLOTS, dtype=torch.int64))
    assert "_local_scalar_dense" in {name for name, *_ in log.seen}


def leave_out_kernels(monkeypatch, launched=None):
    """Kernels do nothing; their names are added to `launched`."""

    class Nothing:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None if launched is None else launched.append(self.name)

    for module, names in (
        (decode, ("append", "second_layer", "scan", "decide", "selected")),
        (pointwise, ("_add_rms_norm", "_rotate_and_gate", "_silu_mul")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Nothing(name))


# Operations that launch nothing on a device.
FREE = {"empty", "empty_like", "new_empty", "detach", "view", "_unsafe_view", "t", "transpose", "slice", "select", "split",
        "split_with_sizes", "squeeze", "unsqueeze", "expand", "as_strided", "alias"}  # fmt: skip


@pytest.mark.parametrize(("phi", "most"), [("linear", 12), ("mlp", 13)])
def test_a_layer_is_few_launches(kernels, monkeypatch, phi, most):
    launched = []
    leave_out_kernels(monkeypatch, launched)
    counts = []
    for layers in (1, 2):
        launched.clear()
        policy = make_policy(num_hidden_layers=layers, qk_norm=True, qkv_bias=True, nsa=NSA | {"phi": phi})
        step, cache, slots = SparseStep(policy), policy.new_cache(2, LONGEST), torch.arange(2)
        with Operations() as log:
            step(cache, slots, slots)
        counts.append(len(launched) + sum(name not in FREE for name, *_ in log.seen))
    assert counts[1] - counts[0] == most


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES = {
    "one_group": {"num_attention_heads": 2, "num_key_value_heads": 2, "nsa": NSA | {"phi": "mean"}},
    "three_a_group": {"num_attention_heads": 3, "num_key_value_heads": 1, "qk_norm": True, "nsa": NSA | {"phi": "mlp"}},
    "biased": {"qkv_bias": True, "tie_word_embeddings": False, "rope_parameters": YARN},
    "all": {
        "num_attention_heads": 6,
        "qkv_bias": True,
        "qk_norm": True,
        "rope_parameters": LLAMA3,
        "rms_norm_eps": 1e-3,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_forward_pass_also_of_new_weights(kernels, shape):
    """Teacher-forced, from before the first block, beyond one window, and across the ends of blocks."""
    policy = make_policy(**SHAPES[shape])
    step = SparseStep(policy)
    generator = torch.Generator().manual_seed(2)
    lengths, more = [1, 3, 37], 3
    for fresh in (False, True):
        if fresh:
            for parameter in policy.parameters():
                parameter.copy_(parameter * 0.7 + torch.randn(parameter.shape, generator=generator) * 0.1)
        texts = [torch.randint(0, 53, (n + more,), generator=generator) for n in lengths]
        cache, slots = policy.new_cache(4, LONGEST), torch.tensor([3, 0, 2])
        prompts = torch.cat([text[:n] for text, n in zip(texts, lengths, strict=True)])
        policy.prefill(cache, slots, prompts, torch.tensor([0, *lengths]).cumsum(0).int())
        ends = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0).int()
        whole = policy(torch.cat(texts), ends).split([len(text) for text in texts])
        for number in range(more):
            tokens = torch.stack([text[n + number] for text, n in zip(texts, lengths, strict=True)])
            got = step(cache, slots, tokens)
            cache.lengths[slots] += 1
            want = torch.stack([logits[n + number] for logits, n in zip(whole, lengths, strict=True)])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_parameters_are_views_of_what_the_step_multiplies_with(kernels):
    policy = make_policy(qkv_bias=True)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    step = SparseStep(policy)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for joined in step.layers:
        assert joined.weight.shape[0] % steps.ROWS_MULTIPLE == 0
        attention = joined.layer.self_attn
        own = [attention.q_proj, attention.k_proj, attention.v_proj, attention.gate_proj]
        for kind, whole in (("weight", joined.weight), ("bias", joined.bias)):
            parts = [getattr(linear, kind) for linear in own]
            assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
            assert not whole[sum(len(part) for part in parts) :].any()
