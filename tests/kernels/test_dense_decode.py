"""The decode step's kernels against their definitions, in Triton's interpreter."""

import math

import pytest
import torch

from plumbline.kernels import decode
from plumbline.kernels.decode import reference

HEADS, KV, DIM, SLOTS, LENGTH = 6, 2, 16, 5, 90


def cache(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    k, v = (torch.randn(SLOTS, KV, LENGTH, DIM).to(dtype) for _ in range(2))
    lengths = torch.tensor([0, 17, 63, 64, 89])
    for slot, n in enumerate(lengths.tolist()):
        k[slot, :, n + 1 :] = v[slot, :, n + 1 :] = float("nan")  # what is beyond a sequence must never be read
    return k, v, lengths


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3], [4, 0]])
def test_triton_attention(order):
    k, v, lengths = cache()
    slots = torch.tensor(order)
    q = torch.randn(len(order), HEADS, DIM)
    got = decode.decode_attention(q, k, v, slots, lengths, 0.3)
    want = reference.decode_attention(q, k, v, slots, lengths, 0.3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_triton_attention_without_splits(monkeypatch):
    monkeypatch.setattr(decode.attention, "ENOUGH_PROGRAMS", 1)
    test_triton_attention([0, 1, 2, 3, 4])


@pytest.mark.parametrize("with_delta", [False, True])
def test_triton_add_rms_norm_and_silu_mul(with_delta):
    torch.manual_seed(1)
    x, delta, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    summed, want = reference.add_rms_norm(x, delta if with_delta else None, weight, 1e-5)
    got = decode.add_rms_norm(x, delta if with_delta else None, weight, 1e-5)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(x, summed)
    torch.testing.assert_close(decode.silu_mul(x), reference.silu_mul(x))


@pytest.mark.parametrize("normed", [False, True])
def test_triton_rotate_and_append(normed):
    from plumbline.models.rope import rotate

    k, v, lengths = cache(2)
    slots = torch.tensor([2, 0])
    qkv = torch.randn(2, (HEADS + 2 * KV) * DIM)
    angles = torch.rand(2, DIM // 2).repeat(1, 2) * 6
    norms = (torch.rand(DIM) + 0.5, torch.rand(DIM) + 0.5, 1e-6) if normed else None
    q = decode.rotate_and_append(qkv, angles.cos(), angles.sin(), k, v, slots, lengths, HEADS, norms)
    heads = qkv.view(2, -1, DIM)
    queries, keys, values = heads.split([HEADS, KV, KV], 1)
    if norms is not None:
        queries = torch.nn.functional.rms_norm(queries, (DIM,), norms[0], 1e-6)
        keys = torch.nn.functional.rms_norm(keys, (DIM,), norms[1], 1e-6)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    torch.testing.assert_close(q, rotate(queries, cos, sin))
    for row, slot in enumerate(slots.tolist()):
        torch.testing.assert_close(k[slot, :, lengths[slot]], rotate(keys, cos, sin)[row])
        torch.testing.assert_close(v[slot, :, lengths[slot]], values[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("normed", "dim"), [(False, 16), (True, 16), (True, 24)])
def test_triton_rotate_and_gate(normed, dim, dtype):
    """Against models/attention.py's own pieces; padding behind the gates is not read.

    The interpreter cuts bfloat16 off where a card rounds, after the norm, after its weight and after the rotation.
    """
    from plumbline.models.attention import RMSNorm
    from plumbline.models.rope import rotate

    torch.manual_seed(4)
    rows = 3
    sizes = [HEADS * dim, 3 * KV * dim, 3 * KV * dim, 3 * HEADS, 5]
    projected = (torch.randn(rows, sum(sizes)) * 2).to(dtype)
    projected[:, -5:] = float("nan")
    projected[0, -5 - 3 * HEADS], projected[1, -6] = -40.0, 40.0
    angles = torch.rand(rows, dim // 2).repeat(1, 2) * 6
    norms = [RMSNorm(dim, 1e-5) for _ in range(2)]
    for norm in norms:
        norm.weight.data = (torch.rand(dim) + 0.5).to(dtype)
    given = (norms[0].weight.data, norms[1].weight.data, 1e-5) if normed else None
    before = projected.clone()
    q, pairs, gates = decode.rotate_and_gate(projected, angles.cos(), angles.sin(), HEADS, KV, given)
    assert torch.equal(projected.nan_to_num(), before.nan_to_num())

    queries, keys, values, logits, _ = projected.split(sizes, 1)
    queries, keys = (x.unflatten(1, (-1, dim)) for x in (queries, keys))
    if normed:
        queries, keys = (norm(x).detach() for norm, x in zip(norms, (queries, keys), strict=True))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 6e-2 if normed else 1e-3}
    torch.testing.assert_close(q, rotate(queries, cos, sin), **tight)
    want = rotate(keys, cos, sin)
    for branch, (k, v) in enumerate(pairs):
        torch.testing.assert_close(k, want[:, branch * KV : (branch + 1) * KV], **tight)
        assert torch.equal(v.flatten(1), values[:, branch * KV * dim : (branch + 1) * KV * dim])
    torch.testing.assert_close(gates.flatten(1), torch.sigmoid(logits), **tight)
    assert gates.is_contiguous()
    assert all(x.dtype == dtype and x.stride(-1) == 1 for x in (q, gates, *(x for pair in pairs for x in pair)))


def test_rotate_and_gate_names_what_is_missing():
    with pytest.raises(ValueError, match=r"projected has 100 columns, fewer than the 306"):
        decode.rotate_and_gate(torch.zeros(1, 100), torch.zeros(1, DIM), torch.zeros(1, DIM), HEADS, KV)


def state(slots=4, limit=3, seed=0):
    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(*shape, dtype=dtype)

    keys = torch.arange(slots) * 7_919_000_003 + 11 + seed
    logprobs = zeros(slots, limit, dtype=torch.float32)
    return decode.State(
        zeros(slots), zeros(slots), zeros(slots), zeros(slots, dtype=torch.int32), keys, zeros(slots, limit), logprobs,
        torch.tensor([5, 4000]),
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_triton_draws_are_the_samplers(temperature):
    from plumbline.rl.batch import Sampling
    from plumbline.rl.rollout.sampler import draw

    torch.manual_seed(3)
    logits = torch.randn(4, 5000) * 3
    logits[:, ::3] = -math.inf
    s = state()
    for position in range(3):
        positions = torch.full((4,), position)
        want, logprobs = draw(logits, Sampling(3, temperature), s.keys, positions)
        decode.draw_tokens(logits, torch.arange(4), s, temperature=temperature, limit=3, advance=True)
        assert s.drawn[:, position].tolist() == want.tolist()
        torch.testing.assert_close(s.logprobs[:, position], logprobs, rtol=1e-4, atol=1e-4)
        assert s.tokens.tolist() == want.tolist()
    assert s.counts.tolist() == s.lengths.tolist() == [3] * 4
    assert s.finished.tolist() == [1] * 4


def test_triton_finished_slots_stay_as_they_are():
    s = state()
    logits = torch.full((2, 5000), -1.0)
    logits[0, 4000] = 50.0  # an end token
    logits[1, 17] = 50.0
    slots = torch.tensor([2, 1])
    decode.draw_tokens(logits, slots, s, temperature=1.0, limit=3, advance=False)
    assert s.finished.tolist() == [0, 0, 1, 0]
    assert s.lengths.tolist() == [0] * 4
    before = [t.clone() for t in (s.tokens, s.counts, s.drawn, s.logprobs)]
    decode.draw_tokens(logits[:1], torch.tensor([2]), s, temperature=1.0, limit=3, advance=True)
    for a, b in zip(before, (s.tokens, s.counts, s.drawn, s.logprobs), strict=True):
        assert torch.equal(a, b)
    assert s.counts.tolist() == [0, 1, 1, 0]
