"""The decoder whose steps CUDA captures, launched kernel by kernel on the CPU (Triton's interpreter), with sparse attention.

What a graph needs is checked here too: a step does the same operations on the same shapes whatever the lengths, and asks
the device for nothing. tests/gpu captures it.
"""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plumbline.models import attention
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.batch import Sampling
from plumbline.rl.rollout import graphed
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


@pytest.fixture
def policy(monkeypatch) -> Policy:
    monkeypatch.setattr(attention, "decode_step", partial(attention.decode_step, backend="triton"))
    monkeypatch.setattr(graphed, "WIDTHS", (4,))  # the interpreter takes its time for every row
    torch.manual_seed(0)
    config = PolicyConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention="nsa",
        nsa=NSA,
        initializer_range=0.25,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Policy(config).float().eval().requires_grad_(False)


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


def leave_out_kernels(monkeypatch):
    from plumbline.kernels.nsa.triton_backend import decode

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for name in ("append", "second_layer", "scan", "decide", "selected"):
        monkeypatch.setattr(decode, name, Nothing())
