"""Decoding on a GPU equals the packed forward, token by token, to 4,096 tokens; a CUDA graph replays it."""

import pytest
import torch

from plumbline.kernels.nsa import DecodePlan, Layout, NSACache, NSAConfig, PhiParams, decode_step
from plumbline.kernels.nsa import native_sparse_attention as attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [4096, 2500, 1030, 31]
# q heads, kv heads, Dqk, Dv, config, dtype, page
CASES = {
    "paper float32": (16, 1, 64, 64, NSAConfig(), torch.float32, None),
    "paper bfloat16 pages": (16, 1, 128, 128, NSAConfig(), torch.bfloat16, 256),
    "g7 192/128 bfloat16": (7, 1, 192, 128, NSAConfig(count=6, window=96), torch.bfloat16, None),
    "g3 mlp float32 pages": (6, 2, 64, 64, NSAConfig(48, 16, 48, 7, 2, 1, 100, phi="mlp"), torch.float32, 64),
    "g4 mean float16": (8, 2, 80, 80, NSAConfig(8, 4, 16, 5, 1, 2, 40, phi="mean"), torch.float16, None),
}


def take(pair, rows):
    return pair[0][rows], pair[1][rows]


def make_cache(kv_heads, dk, dv, config, dtype, page, new=1):
    """(cache, slots or page table), of shuffled slots or pages; what is not theirs is NaN."""
    longest, batch = max(LENGTHS), len(LENGTHS)
    slots = batch + 1 if page is None else batch * (longest // page) + 1
    cache = NSACache(slots, longest, kv_heads, dk, dv, config, page=page, new=new, dtype=dtype, device="cuda")
    order = torch.randperm(slots, device="cuda")
    for tensor in cache.tensors():
        tensor[order[-1]] = torch.nan
    return cache, order[:batch] if page is None else order[:-1].view(batch, -1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decode_equals_forward(definition, name):
    heads, kv_heads, dk, dv, config, dtype, page = CASES[name]
    seed = int(torch.randint(2**31, (1,)))
    x = definition.make_inputs(LENGTHS, heads, kv_heads, dk, dv, config, seed=seed, dtype=dtype, device="cuda")
    params = PhiParams(*x.params)
    expected, blocks = attention(x.q, *x.kv, x.gates, x.cu_seqlens, params, config, return_blocks=True)
    cache, slots = make_cache(kv_heads, dk, dv, config, dtype, page, new=4)
    starts, lengths = x.cu_seqlens[:-1].long(), torch.tensor(LENGTHS, device="cuda")
    out, chosen = torch.full_like(expected, torch.nan), torch.full_like(blocks, -2)
    t = 0
    while t < max(LENGTHS):
        # Now and then several tokens at once.
        new = 4 if t % 64 == 28 else 1
        live = lengths >= t + new
        at = torch.full((int(live.sum()),), t, device="cuda")
        rows = ((starts[live] + t)[:, None] + torch.arange(new, device="cuda")).flatten()
        plan = DecodePlan(slots[live], at, config, cache.max_length, new=new, page=page, longest=t + new)
        out[rows], chosen[rows] = decode_step(
            x.q[rows], *(take(pair, rows) for pair in x.kv), x.gates[rows], cache, plan, params,
            backend="triton", return_blocks=True,
        )  # fmt: skip
        t += new
    # The last tokens of a sequence that is no multiple of the steps may be left out.
    done = (chosen != -2).any(-1).all(-1)
    assert int(done.sum()) > sum(LENGTHS) - 4 * len(LENGTHS)
    same = (chosen == blocks).all(-1).all(-1)[done]
    # Compressed blocks are rounded in other orders, so that choices between near equals may differ.
    share = float((~same).float().mean())
    assert share < (1e-3 if dtype == torch.float32 else 0.05), (seed, share)
    error = definition.error(out[done][same], expected[done][same])
    print(name, f"error {error:.1e}", f"other blocks {share:.1e}")
    assert error < (1e-5 if dtype == torch.float32 else 5e-3), (seed, error)


@torch.no_grad()
def test_prefill_then_decode(definition):
    config, prompts = NSAConfig(), [1500, 0, 65, 16]
    x = definition.make_inputs([2048] * 4, 8, 2, 64, 64, config, seed=7, dtype=torch.float32, device="cuda")
    params = PhiParams(*x.params)
    expected = attention(x.q, *x.kv, x.gates, x.cu_seqlens, params, config)
    for page in (None, 128):
        cache, slots = make_cache(2, 64, 64, config, torch.float32, page)
        starts, first = x.cu_seqlens[:-1].long(), torch.tensor(prompts, device="cuda")
        rows = torch.cat([starts[b] + torch.arange(n, device="cuda") for b, n in enumerate(prompts)])
        layout = Layout(torch.tensor([0, *prompts]).cumsum(0).int().cuda())
        cache.prefill(slots, *(take(pair, rows) for pair in x.kv), layout, params)
        for step in range(100):
            rows = starts + first + step
            plan = DecodePlan(slots, first + step, config, cache.max_length, page=page)
            out = decode_step(x.q[rows], *(take(p, rows) for p in x.kv), x.gates[rows], cache, plan, params)
            assert definition.error(out, expected[rows]) < 1e-5


@torch.no_grad()
def test_a_graph_replays_every_step(definition):
    config, steps = NSAConfig(count=5, window=80), 700
    x = definition.make_inputs([steps] * 3, 8, 2, 64, 64, config, seed=5, dtype=torch.bfloat16, device="cuda")
    params = PhiParams(*x.params)
    starts, slots = x.cu_seqlens[:-1].long(), torch.arange(3, device="cuda")
    options = {"dtype": torch.bfloat16, "device": "cuda"}

    def rows_of(position):
        rows = starts + position
        return x.q[rows], *(take(pair, rows) for pair in x.kv), x.gates[rows]

    eager = NSACache(3, steps, 2, 64, 64, config, **options)
    expected = []
    for t in range(steps):
        plan = DecodePlan(slots, torch.full((3,), t, device="cuda"), config, steps, longest=steps)
        expected.append(decode_step(*rows_of(plan.position), eager, plan, params))
    cache = NSACache(3, steps, 2, 64, 64, config, **options)
    position = torch.zeros(3, dtype=torch.int64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = DecodePlan(slots, position, config, steps, longest=steps)
        out = decode_step(*rows_of(position), cache, plan, params)
        position += 1
    for t in range(steps):
        graph.replay()
        assert torch.equal(out, expected[t]), t
