"""Both implementations against the float64 definition: outputs, blocks and every gradient."""

import pytest
import torch

from plumbline.kernels.nsa import (
    NSAConfig,
    PhiParams,
    compress,
    compressed_attention,
    native_sparse_attention,
    select_blocks,
    selected_attention,
    window_attention,
)

SMALL = NSAConfig(block=8, stride=4, select_block=8, count=4, window=12)
# (lengths, q heads, kv heads, Dqk, Dv, config)
TORCH_CASES = {
    "short": ([0, 1, 7, 8, 9, 40, 0], 4, 2, 16, 16, SMALL),
    "one": ([1], 3, 1, 8, 8, SMALL),
    "group7": ([33, 50], 7, 1, 24, 16, SMALL),
    "uniform": ([48, 48], 6, 2, 20, 12, SMALL),
    "mean": ([45, 3], 4, 4, 16, 16, NSAConfig(8, 4, 16, 3, 1, 1, 5, phi="mean")),
    "mlp": ([60], 4, 2, 16, 16, NSAConfig(12, 4, 8, 5, 1, 2, 7, phi="mlp")),
    "wide": ([70, 31], 2, 1, 16, 16, NSAConfig(16, 4, 8, 4, 2, 1, 3)),
    "no local": ([64], 2, 1, 16, 16, NSAConfig(8, 4, 8, 3, 1, 0, 16, scale=0.3)),
}
TRITON_CASES = {name: TORCH_CASES[name] for name in ("short", "group7", "wide", "no local")}
TRITON_CASES["paper"] = ([37, 0, 20], 4, 1, 192, 128, SMALL)
# Head dims that can be worked in parts: 128 + 64, 64 + 16, 64 + 32, and a second part that is not full.
PART_CASES = {
    "paper": TRITON_CASES["paper"],
    "dim 80": ([21, 40], 4, 2, 80, 80, SMALL),
    "dim 96": ([33], 3, 1, 96, 96, SMALL),
    "dim 140": ([50], 2, 1, 140, 24, SMALL),
}
TRITON_CASES["odd block"] = ([61], 3, 1, 16, 24, NSAConfig(6, 2, 6, 4, 1, 2, 9, phi="mean"))


def run(x, config, backend, **options):
    return native_sparse_attention(
        x.q, *x.kv, x.gates, x.cu_seqlens, PhiParams(*x.params), config, backend=backend, **options
    )


def check(definition, case, backend, tolerance, seed):
    lengths, heads, kv_heads, dk, dv, config = case
    x = definition.make_inputs(lengths, heads, kv_heads, dk, dv, config, seed=seed)
    y = definition.as_float64(x)
    out, blocks = run(x, config, backend, return_blocks=True)
    expected = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, config)
    for t, of_token in enumerate(expected.choice):
        for h, js in enumerate(of_token):
            assert [j for j in blocks[t, h].tolist() if j >= 0] == js, (t, h)
            assert blocks[t, h].tolist() == js + [-1] * (config.count - len(js))
    assert definition.error(out, expected.out) < tolerance
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
    (out * weight).sum().backward()
    (expected.out * weight.double()).sum().backward()
    errors = definition.gradient_errors(x, y)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("name", TORCH_CASES)
def test_torch(definition, name):
    check(definition, TORCH_CASES[name], "torch", 1e-5, seed=len(name))


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton_interpreter(definition, name):
    check(definition, TRITON_CASES[name], "triton", 1e-5, seed=len(name))


@pytest.fixture
def in_parts(monkeypatch):
    """Also where the environment asks for padding."""
    from plumbline.kernels.nsa.triton_backend import parts

    monkeypatch.setattr(parts, "IN_PARTS", True)
    return parts


@pytest.mark.parametrize("padded", [False, True], ids=["parts", "padded"])
@pytest.mark.parametrize("name", PART_CASES)
def test_triton_interpreter_where_head_dims_are_no_power_of_two(definition, monkeypatch, in_parts, padded, name):
    monkeypatch.setattr(in_parts, "IN_PARTS", not padded)
    check(definition, PART_CASES[name], "triton", 1e-5, seed=len(name))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_functions_one_by_one(definition, backend):
    lengths = [5, 0, 44]
    x = definition.make_inputs(lengths, 4, 2, 16, 16, SMALL, seed=3)
    y = definition.as_float64(x)
    expected = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, SMALL)
    (k, v), cu = x.kv[0], x.cu_seqlens
    sizes = {"block": SMALL.block, "stride": SMALL.stride, "backend": backend}
    k_cmp, cu_blocks = compress(k, x.params[0], x.params[1], cu, **sizes)
    v_cmp, _ = compress(v, x.params[2], x.params[3], cu, **sizes)
    o_cmp, lse = compressed_attention(x.q, k_cmp, v_cmp, cu, cu_blocks, **sizes)
    blocks = select_blocks(x.q, k_cmp, lse, cu, cu_blocks, **sizes, select_block=SMALL.select_block, count=SMALL.count)
    o_slc = selected_attention(x.q, *x.kv[1], blocks, cu, select_block=SMALL.select_block, backend=backend)
    o_win = window_attention(x.q, *x.kv[2], cu, window=SMALL.window, backend=backend)
    assert cu_blocks.tolist() == [0, 0, 0, 10]
    for branch, out in enumerate((o_cmp, o_slc, o_win)):
        assert definition.error(out, expected.branches[branch]) < 1e-5, branch
    assert torch.isneginf(lse[:5]).all()
    (
        sum(o_cmp.sum(-1)) + 0.1 * lse[5 + SMALL.block :].sum(0) + sum(o_slc.sum(-1)) + sum(o_win.sum(-1))
    ).sum().backward()
    y_lse = []
    for g in range(4):
        kc = definition.phi(
            y.kv[0][0][5:, g // 2], y.params[0][g // 2], y.params[1][g // 2], SMALL.block, SMALL.stride, "linear"
        )
        t, i = torch.arange(44), torch.arange(10)
        logits = (y.q[5:, g] @ kc.T) / 4
        logits = logits.masked_fill(i[None] * SMALL.stride + SMALL.block - 1 > t[:, None], -torch.inf)
        y_lse.append(torch.logsumexp(logits[SMALL.block :], -1).sum())
    (expected.branches.sum() + 0.1 * sum(y_lse)).backward()
    errors = definition.gradient_errors(x, y)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_replayed_blocks_are_used(definition, backend):
    lengths = [40, 17]
    x = definition.make_inputs(lengths, 2, 1, 16, 16, SMALL, seed=5)
    y = definition.as_float64(x)
    generator = torch.Generator().manual_seed(9)
    blocks = torch.full((57, 1, 3), -1, dtype=torch.int32)
    for t in range(57):
        own = (t if t < 40 else t - 40) // SMALL.select_block
        some = torch.randperm(own + 1, generator=generator)[:3].sort().values
        blocks[t, 0, : len(some)] = some.int()
    out, used = run(x, SMALL, backend, block_indices=blocks, return_blocks=True)
    expected = definition.sparse_attention(y.q, *y.kv, y.gates, lengths, y.params, SMALL, blocks=blocks)
    assert torch.equal(used, blocks)
    assert definition.error(out, expected.out) < 1e-5
    out.sum().backward()
    expected.out.sum().backward()
    assert definition.error(x.kv[1][0].grad, y.kv[1][0].grad) < 1e-5
    assert definition.error(x.q.grad, y.q.grad) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_large_logits_stay_finite(definition, backend):
    x = definition.make_inputs([37], 2, 1, 16, 16, SMALL, seed=6, spread=1000.0)
    out = run(x, SMALL, backend)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(leaf.grad.isfinite().all() for leaf in definition.leaves(x))


def test_short_context_with_open_selection_is_dense_attention(definition):
    config = NSAConfig(8, 4, 8, 16, 1, 2, 12)
    x = definition.make_inputs([100], 4, 2, 16, 16, config, seed=7)
    gates = torch.zeros(100, 4, 3)
    gates[..., 1] = 1
    out = native_sparse_attention(x.q, *x.kv, gates, x.cu_seqlens, PhiParams(*x.params), config)
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, *x.kv[1]))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(
        0, 1
    )
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)


def test_chunks_of_queries_change_nothing(definition, monkeypatch):
    from plumbline.kernels.nsa import layout, reference

    x = definition.make_inputs([100, 30], 4, 2, 16, 16, SMALL, seed=8)
    whole = run(x, SMALL, "torch")
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(layout, "KEEP_MASK_TOKENS", 10)
    torch.testing.assert_close(run(x, SMALL, "torch"), whole, rtol=1e-5, atol=1e-6)


def test_triton_chunks_of_pairs_change_nothing(definition, monkeypatch):
    from plumbline.kernels.nsa.triton_backend import launch, scores

    x = definition.make_inputs([100, 61], 2, 1, 16, 16, SMALL, seed=8)
    whole = run(x, SMALL, "triton")
    whole.sum().backward()
    grads = [leaf.grad.clone() for leaf in definition.leaves(x)]
    for leaf in definition.leaves(x):
        leaf.grad = None
    monkeypatch.setattr(launch, "PAIR_BYTES", 1)
    monkeypatch.setattr(scores, "CHUNK_BYTES", 1)
    again = run(x, SMALL, "triton")
    again.sum().backward()
    torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)
    for a, leaf in zip(grads, definition.leaves(x), strict=True):
        torch.testing.assert_close(leaf.grad, a, rtol=1e-4, atol=1e-5)


def test_triton_equals_itself_bit_for_bit(definition):
    runs = []
    for _ in range(2):
        x = definition.make_inputs([50, 9], 3, 1, 16, 16, SMALL, seed=2)
        run(x, SMALL, "triton").sum().backward()
        runs.append([leaf.grad for leaf in definition.leaves(x)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (10, 3, 16)}, "q has 3 heads"),
        ({"k": (10, 2, 8)}, "head dim"),
        ({"k": (9, 2, 16)}, "rows"),
        ({"dtype": torch.bfloat16}, "k is torch.bfloat16 and q torch.float32"),
        ({"window": 0}, "window"),
        ({"backend": "cuda"}, "backend"),
        ({"scale": -1.0}, "scale"),
        ({"cu": torch.tensor([0, 10])}, "cu_seqlens"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = (
        torch.randn(change.get("q", (10, 4, 16))),
        torch.randn(change.get("k", (10, 2, 16)), dtype=change.get("dtype")),
        torch.randn(10, 2, 16),
    )
    options = {
        "window": change.get("window", 4),
        "backend": change.get("backend", "auto"),
        "scale": change.get("scale"),
    }
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, change.get("cu", torch.tensor([0, 10], dtype=torch.int32)), **options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"block": 10}, "block"),
        ({"select_block": 30}, "select_block"),
        ({"count": 2}, "count"),
        ({"phi": "max"}, "phi"),
    ],
)
def test_bad_config_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**{"stride": 4, "block": 8, "select_block": 8, **sizes})


def test_parts_hold_every_head_dim(in_parts):
    from plumbline.kernels.nsa.triton_backend.common import pad_dim
    from plumbline.kernels.nsa.triton_backend.parts import widths

    assert [widths(dim) for dim in (192, 160, 128, 96, 80, 72)] == [
        (128, 64), (128, 32), (128, 0), (64, 32), (64, 16), (64, 16)
    ]  # fmt: skip
    for dim in range(1, 257):
        first, second = widths(dim)
        assert first + second >= dim, dim
        assert all(n & (n - 1) == 0 and n >= 16 for n in (first, second) if n), dim
        assert first + second < pad_dim(dim) if second else first == pad_dim(dim), dim


@pytest.mark.parametrize(("dk", "dv"), [(16, 12), (192, 128), (136, 16)])
def test_triton_tiles_through_descriptors(definition, in_parts, monkeypatch, dk, dv):
    """What bfloat16 uses on a GPU: tensor descriptors instead of pointers, here in float32 under the interpreter."""
    from dataclasses import replace

    from plumbline.kernels.nsa.triton_backend import launch

    used = []

    def count(make):
        def wrapped(*arguments):
            used.append(make(*arguments))
            return used[-1]

        return wrapped

    for name in ("forward_tiles", "query_tiles", "key_tiles"):
        plain = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda x, dv, group, plain=plain: replace(plain(x, dv, group), tma=True))
    for name in ("key_descriptor", "query_descriptor"):
        monkeypatch.setattr(launch, name, count(getattr(launch, name)))
    check(definition, ([45, 0, 21], 4, 2, dk, dv, SMALL), "triton", 1e-5, seed=11)
    assert used
    assert all(used)


@pytest.mark.parametrize("levels", [3, 60, 10**6])
@pytest.mark.parametrize("sizes", [(16, 1, 2), (4, 0, 1), (3, 1, 2), (30, 2, 0)])
def test_triton_choice_among_many_blocks(levels, sizes):
    """Ties of all sizes, few and many blocks, over enough blocks for the narrow ranking."""
    import triton

    from plumbline.kernels.nsa.reference import choose as expected
    from plumbline.kernels.nsa.triton_backend.scores import choose

    count, initial, local = sizes
    generator = torch.Generator().manual_seed(levels + count)
    width, queries = 512, 8
    spans = [(0, 8), (1030, 1038), (2040, 2047)]
    tiles = torch.tensor([[0, 2048, first, end, 0, 0] for first, end in spans]).int()
    scores = torch.randint(levels, (3, queries, 1, width), generator=generator).float()
    scores[2, 3] = 0
    out = torch.full((2048, 1, count), -2, dtype=torch.int32)
    choose[(3 * queries, 1)](
        scores[None].clone(), out, tiles, 1, 0, width, QUERIES=queries, WIDTH=width, SPILL=0, S=4, COUNT=count,
        COUNT2=triton.next_power_of_2(count), INITIAL=initial, LOCAL=local, num_warps=1,
    )  # fmt: skip
    for tile, (first, end) in enumerate(spans):
        t = torch.arange(first, end)
        wanted = expected(scores[tile, : end - first, 0], t, 4, count, initial, local)
        assert torch.equal(out[first:end, 0], wanted), tile
    assert (out[[8, 1029, 1038, 2039, 2047]] == -2).all()
