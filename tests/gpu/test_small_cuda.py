"""A small case of every kernel, short enough for compute-sanitizer, and the choice among many blocks."""

import pytest
import torch
import triton

from plumbline.kernels.nsa import DecodePlan, NSACache, NSAConfig, PhiParams, decode_step
from plumbline.kernels.nsa import native_sparse_attention as attention
from plumbline.kernels.nsa.reference import choose as expected_choice
from plumbline.kernels.nsa.triton_backend.scores import choose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = NSAConfig(block=32, stride=16, select_block=64, count=4, window=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_small_training(definition, dtype):
    """Forced blocks and chosen ones, then given ones only, then all of them."""
    x = definition.make_inputs([400, 33, 0, 1], 6, 2, 64, 64, SMALL, seed=3, dtype=dtype, device="cuda")
    out, blocks = attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), SMALL, return_blocks=True)
    given = attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), SMALL, block_indices=blocks)
    whole = NSAConfig(block=32, stride=16, select_block=64, count=16, window=64)
    every = attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), whole)
    (out.float() + given.float() + every.float()).sum().backward()
    assert definition.error(given, out) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert all(leaf.grad.isfinite().all() for leaf in definition.leaves(x))


@pytest.mark.parametrize("phi", ["linear", "mean", "mlp"])
@pytest.mark.parametrize("page", [None, 64])
@torch.no_grad()
def test_small_decoding(definition, phi, page):
    config = NSAConfig(block=32, stride=16, select_block=64, count=4, window=300, phi=phi)
    lengths = [400, 224]
    x = definition.make_inputs(lengths, 6, 2, 64, 64, config, seed=3, device="cuda")
    params = PhiParams(*x.params)
    expected = attention(x.q, *x.kv, x.gates, x.cu_seqlens, params, config)
    options = {"page": page, "new": 4, "dtype": torch.float32, "device": "cuda"}
    cache = NSACache(2 if page is None else 14, 400, 2, 64, 64, config, **options)
    slots = torch.arange(2, device="cuda") if page is None else torch.arange(14, device="cuda").view(2, 7)
    starts = x.cu_seqlens[:-1].long()
    for t in range(0, 224, 4):
        rows = (starts[:, None] + t + torch.arange(4, device="cuda")).flatten()
        plan = DecodePlan(slots, torch.full((2,), t, device="cuda"), config, 400, new=4, page=page)
        pairs = [(k[rows], v[rows]) for k, v in x.kv]
        out = decode_step(x.q[rows], *pairs, x.gates[rows], cache, plan, params)
        assert definition.error(out, expected[rows]) < 1e-5, t


@pytest.mark.parametrize("levels", [3, 60, 10**6])
def test_choice_among_many_blocks(levels):
    """Against the plain definition, with ties, where the choice is narrowed to a few blocks first."""
    width, queries, count = 1024, 16, 16
    generator = torch.Generator("cuda").manual_seed(levels)
    firsts = [0, 4000, 40000, 65520]
    tiles = torch.tensor([[0, 65536, first, first + queries, 0, 0] for first in firsts], device="cuda").int()
    scores = torch.randint(levels, (len(firsts), queries, 2, width), generator=generator, device="cuda").float()
    out = torch.full((65536, 2, count), -2, dtype=torch.int32, device="cuda")
    choose[(len(firsts) * queries, 2)](
        scores[None].clone(), out, tiles, 2, 0, width, QUERIES=queries, WIDTH=width, SPILL=0, S=64, COUNT=count,
        COUNT2=triton.next_power_of_2(count), INITIAL=1, LOCAL=2, num_warps=1,
    )  # fmt: skip
    for tile, first in enumerate(firsts):
        t = torch.arange(first, first + queries, device="cuda")
        for head in range(2):
            wanted = expected_choice(scores[tile, :, head], t, 64, count, 1, 2)
            assert torch.equal(out[first : first + queries, head], wanted), (first, head)
