"""Gradients through phi in a 16-bit type, where they are sums that nearly cancel.

The interpreter has no bfloat16 products; float16 rounds in the same places, eight times finer, so that the bound is an
eighth of bfloat16's 5e-3.
"""

import pytest
import torch

from plumbline.kernels.nsa import NSAConfig, PhiParams, native_sparse_attention

# q heads, kv heads, dim, lengths, config
CASES = {
    "mlp": (2, 1, 40, [60, 0, 35], NSAConfig(8, 4, 8, 4, 1, 1, 12, phi="mlp")),
    "narrow mean": (2, 2, 16, [90], NSAConfig(8, 4, 16, 5, 1, 2, 40, phi="mean")),
}


def errors_of(definition, case, seed):
    heads, kv_heads, dim, lengths, config = case
    x = definition.make_inputs(lengths, heads, kv_heads, dim, dim, config, seed=seed, dtype=torch.float16)
    with torch.no_grad():
        x.gates[::5, :, 0] = 0
    y = definition.as_float64(x)
    out, blocks = native_sparse_attention(
        x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), config, backend="triton", return_blocks=True
    )
    expected = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, config, blocks=blocks)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1)).half()
    (out * weight).sum().backward()
    (expected.out * weight.double()).sum().backward()
    return {"out": definition.error(out, expected.out), **definition.gradient_errors(x, y)}


@pytest.mark.parametrize("name", CASES)
def test_triton_gradients_through_phi(definition, name):
    for seed in range(2):
        errors = errors_of(definition, CASES[name], seed)
        print(name, seed, {k: f"{v:.1e}" for k, v in errors.items()})
        assert max(errors.values()) < 6.25e-4, errors
        assert max(errors["k_cmp"], errors["k_weight"]) < 5e-4, errors
