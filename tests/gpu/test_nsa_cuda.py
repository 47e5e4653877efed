"""The Triton kernels on a GPU against the float64 definition."""

import pytest
import torch

from plumbline.kernels.nsa import NSAConfig, PhiParams, native_sparse_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIXED = [0, 1, 31, 32, 33, 511, 513, 1024]
PAPER = NSAConfig()
FEW = NSAConfig(count=6, window=96)
SMALL = NSAConfig(8, 4, 16, 5, 1, 2, 40, phi="mean")
ODD = NSAConfig(48, 16, 48, 7, 2, 1, 100, phi="mlp")
# q heads, kv heads, Dqk, Dv, lengths, config
CASES = {
    "g16 d128": (16, 1, 128, 128, MIXED, FEW),
    "g16 long": (16, 1, 128, 128, [4097], PAPER),
    "g1 d16": (2, 2, 16, 16, MIXED, SMALL),
    "g3 d64": (9, 3, 64, 64, MIXED, FEW),
    "g4 d80": (4, 1, 80, 80, MIXED, ODD),
    "g6 d128": (6, 1, 128, 128, MIXED, FEW),
    "g7 d192/128": (7, 1, 192, 128, MIXED, FEW),
    "g16 d192/128": (16, 1, 192, 128, MIXED, FEW),
    "g2 d96": (4, 2, 96, 96, MIXED, FEW),
    "g2 d256": (2, 1, 256, 256, [700, 3], FEW),
}


def check_blocks(blocks, expected, tolerance):
    """Chosen blocks equal, or swapped for others of the same importance within rounding."""
    for t, of_token in enumerate(expected.choice):
        for h, wanted in enumerate(of_token):
            got = {j for j in blocks[t][h] if j >= 0}
            missed, extra = set(wanted) - got, got - set(wanted)
            assert len(missed) == len(extra), (t, h)
            if missed:
                scores = expected.importance[t][h]
                low = min(float(scores[j]) for j in missed | extra)
                high = max(float(scores[j]) for j in missed | extra)
                assert high - low <= tolerance * float(scores.sum()), (t, h, missed, extra, low, high)


def errors_of(definition, case, dtype, seed):
    heads, kv_heads, dk, dv, lengths, config = case
    x = definition.make_inputs(lengths, heads, kv_heads, dk, dv, config, seed=seed, dtype=dtype, device="cuda")
    y = definition.as_float64(x)
    out, blocks = native_sparse_attention(
        x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), config, backend="triton", return_blocks=True
    )
    with torch.no_grad():
        free = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, config)
    check_blocks(blocks.tolist(), free, 1e-4 if dtype == torch.float32 else 1e-2)
    expected = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, config, blocks=blocks)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).to("cuda", dtype)
    (out * weight).sum().backward()
    (expected.out * weight.double()).sum().backward()
    return {"out": definition.error(out, expected.out), **definition.gradient_errors(x, y)}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(definition, name, dtype):
    seed = int(torch.randint(2**31, (1,)))
    errors = errors_of(definition, CASES[name], dtype, seed)
    print(name, dtype, {k: f"{v:.1e}" for k, v in errors.items()})
    for key, value in errors.items():
        assert value < (1e-5 if dtype == torch.float32 else 5e-3), (key, seed, errors)


def test_two_runs_are_equal_bit_for_bit(definition):
    runs = []
    for _ in range(2):
        x = definition.make_inputs([2500, 77], 8, 2, 64, 64, FEW, seed=1, dtype=torch.bfloat16, device="cuda")
        out = native_sparse_attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), FEW)
        out.float().square().sum().backward()
        runs.append([out, *(leaf.grad for leaf in definition.leaves(x))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_every_element_is_written(definition):
    """Memory left full of NaN by an earlier owner must not show through."""
    x = definition.make_inputs([1300, 40, 0, 1], 8, 2, 64, 64, FEW, seed=4, dtype=torch.bfloat16, device="cuda")
    poison = [torch.full((2**26,), torch.nan, device="cuda") for _ in range(16)]
    del poison
    out = native_sparse_attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), FEW)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in definition.leaves(x))


def test_large_logits_stay_finite(definition):
    x = definition.make_inputs([900], 4, 1, 64, 64, FEW, seed=5, dtype=torch.bfloat16, device="cuda", spread=1000.0)
    out = native_sparse_attention(x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), FEW)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in definition.leaves(x))
