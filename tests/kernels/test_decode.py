"""Decoding from the cache equals the packed forward, token by token, with the same blocks."""

import pytest
import torch

from plumbline.kernels.nsa import (
    DecodePlan,
    Layout,
    NSACache,
    NSAConfig,
    PhiParams,
    decode_step,
    native_sparse_attention,
)

CONFIGS = {
    "linear": NSAConfig(block=8, stride=4, select_block=8, count=4, window=12),
    "mlp": NSAConfig(block=12, stride=4, select_block=16, count=3, initial=1, local=1, window=5, phi="mlp"),
    "mean": NSAConfig(block=4, stride=4, select_block=4, count=5, initial=2, local=2, window=40, phi="mean"),
}


def take(pair, rows):
    return pair[0][rows], pair[1][rows]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompts", [[0, 0, 0], [0, 23, 7]], ids=["empty", "prefilled"])
@torch.no_grad()
def test_decode_equals_forward(definition, name, prompts):
    config, lengths = CONFIGS[name], [61, 50, 37]
    x = definition.make_inputs(lengths, 4, 2, 16, 12, config, seed=1)
    params = PhiParams(*x.params)
    expected, blocks = native_sparse_attention(
        x.q, *x.kv, x.gates, x.cu_seqlens, params, config, return_blocks=True, backend="torch"
    )
    # The three sequences sit in slots of a larger cache, out of order.
    slots = torch.tensor([4, 0, 2])
    cache = NSACache(5, 64, 2, 16, 12, config, dtype=torch.float32, device="cpu")
    starts = x.cu_seqlens[:-1].long()
    first = torch.tensor(prompts)
    if sum(prompts):
        rows = torch.cat([starts[b] + torch.arange(n) for b, n in enumerate(prompts)])
        layout = Layout(torch.tensor([0, *prompts]).cumsum(0).int())
        cache.prefill(slots, *(take(pair, rows) for pair in x.kv), layout, params)
    for step in range(max(n - p for n, p in zip(lengths, prompts, strict=True))):
        position = first + step
        live = position < torch.tensor(lengths)
        rows = (starts + position)[live]
        plan = DecodePlan(slots[live], position[live], config, cache.max_length)
        out, chosen = decode_step(
            x.q[rows], *(take(pair, rows) for pair in x.kv), x.gates[rows], cache, plan, params, return_blocks=True
        )
        torch.testing.assert_close(out, expected[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen, blocks[rows])


def test_a_full_slot_is_refused():
    config = CONFIGS["linear"]
    with pytest.raises(ValueError, match="does not fit a cache of 8"):
        DecodePlan(torch.tensor([0]), torch.tensor([8]), config, 8)
    cache = NSACache(1, 8, 1, 4, 4, config, dtype=torch.float32, device="cpu")
    pair = torch.zeros(9, 1, 4), torch.zeros(9, 1, 4)
    zeros = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4)
    layout = Layout(torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="9 tokens does not fit"):
        cache.prefill(torch.tensor([0]), pair, pair, pair, layout, PhiParams(*zeros, *zeros))
