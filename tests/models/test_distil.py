"""Planted repeats are copies of what lies before them, and the teacher is the dense policy that was converted."""

from __future__ import annotations

import pytest
import torch

from plumbline.models.adapt import open_gates, sparse_layers
from plumbline.models.config import PolicyConfig
from plumbline.models.distil import dense_policy, divergence_from, plant_repeats
from plumbline.models.load import load_policy
from plumbline.models.policy import Policy


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "share"), [(16, 0.25), (5, 0.6), (64, 0.1)])
def test_planted_passages_repeat_earlier_ones(length, share):
    rows = torch.arange(3 * 500).view(3, 500)  # each token once: what is there twice was planted
    planted, positions = plant_repeats(rows, share, length, generator(1))
    assert torch.equal(rows, torch.arange(3 * 500).view(3, 500))
    count = round(share * 500 / length)
    assert len(positions) == count * (length - 1)
    assert positions.tolist() == sorted(set(positions.tolist()))
    repeated, sources = set(positions.tolist()), set()
    for row, kept in zip(planted, rows, strict=True):
        seen, pairs = set(), set()
        for place, token in enumerate(row.tolist()):
            if place in repeated:
                pair = (token, int(row[place + 1]))
                assert pair in pairs  # the next token followed this one before
            elif token in seen:  # the last of a passage
                assert place - 1 in repeated
            else:
                assert token == kept[place]
            seen.add(token)
            if place:
                pairs.add((int(row[place - 1]), token))
        sources.add(tuple(row.tolist()))
    assert len(sources) == 3
    again, same = plant_repeats(rows, share, length, generator(1))
    assert torch.equal(again, planted)
    assert torch.equal(same, positions)
    other = plant_repeats(rows, share, length, generator(2))[1]
    assert other.tolist() != positions.tolist()


def test_no_share_and_no_room_plant_nothing():
    rows = torch.arange(40).view(2, 20)
    for share, length in ((0.0, 4), (0.5, 20), (0.5, 1)):
        planted, positions = plant_repeats(rows, share, length, generator(0))
        assert torch.equal(planted, rows)
        assert positions.shape == (0,)
    # More than there is room for: all but the first passage.
    planted, positions = plant_repeats(rows, 0.99, 4, generator(0))
    assert 0 < len(positions) <= 4 * 3


NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
SHAPES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True},
}


@pytest.fixture(params=SHAPES)
def pair(request, tmp_path) -> tuple[Policy, Policy]:
    """A random dense policy and its conversion, gates opened."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    dense = Policy(PolicyConfig(attention="full", initializer_range=0.15, **sizes, **SHAPES[request.param])).eval()
    for name, value in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    dense.save_pretrained(tmp_path / "dense")
    sparse = load_policy(tmp_path / "dense", attention="nsa", nsa=NSA)
    open_gates(sparse, 0.05)
    return dense, sparse


def test_the_teacher_is_the_policy_that_was_converted(pair):
    dense, sparse = pair
    teacher = dense_policy(sparse)
    assert teacher.config.attention == "full"
    ids, ends = torch.randint(0, 40, (90,)), torch.tensor([0, 90], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(teacher(ids, ends), dense(ids, ends))
        # A copy: it stays when the policy learns.
        for layer in sparse_layers(sparse):
            layer.k_proj.weight.add_(1)
        sparse.model.embed_tokens.weight.mul_(2)
        assert torch.equal(teacher(ids, ends), dense(ids, ends))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_divergence_is_that_of_the_next_token_distributions(pair, monkeypatch):
    dense, sparse = pair
    monkeypatch.setattr("plumbline.models.distil.LOGIT_ROWS", 13)
    hidden = torch.randn(40, 32, requires_grad=True)
    wanted = torch.randn(40, 32)
    loss = divergence_from(dense, sparse, wanted, hidden)
    loss.backward()
    with torch.no_grad():
        p = torch.log_softmax(dense.lm_head(wanted).double(), -1)
    again = hidden.detach().double().requires_grad_()
    q = torch.log_softmax(again @ sparse.lm_head.weight.double().T, -1)
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad.double(), again.grad, rtol=1e-4, atol=1e-5)
    assert dense.lm_head.weight.grad is None
    same = divergence_from(dense, dense, wanted, wanted.clone().requires_grad_())
    assert abs(same.item()) < 1e-5
