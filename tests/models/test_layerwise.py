"""The layer stage: its losses against the layer and loops from the formula, what it trains, and that it helps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from plumbline.kernels.nsa import Layout, NSAConfig
from plumbline.models.adapt import Recipe, adapt, open_gates, sparse_layers
from plumbline.models.attention import FullAttention, open_gate_bias
from plumbline.models.config import PolicyConfig
from plumbline.models.layerwise import (
    Student,
    chosen_blocks,
    divergence,
    exact_mass,
    free_blocks,
    layerwise_step,
    scaled_queries,
    sparse_at,
)
from plumbline.models.longcontext import Needle, attention_recall, block_choices, needle_recall
from plumbline.models.policy import Policy

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
ROOMY = {**NSA, "count": 6}
LENGTH = 93
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
}


def converted(nsa: dict[str, int] = NSA, **changes) -> tuple[Policy, Policy]:
    """A random dense policy and its conversion."""
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    dense = Policy(PolicyConfig(attention="full", **shape)).eval()
    sparse = Policy(PolicyConfig(attention="nsa", nsa=nsa, **shape)).eval()
    own = sparse.state_dict()
    for name, value in dense.state_dict().items():
        threefold = ".k_proj." in name or ".v_proj." in name
        own[name].copy_(torch.cat([value] * 3) if threefold else value)
    for layer in sparse_layers(sparse):
        layer.reset_phi()
        torch.nn.init.zeros_(layer.gate_proj.weight)
        layer.gate_proj.bias.data.copy_(open_gate_bias(layer.heads))
    return dense, sparse


@pytest.mark.parametrize("kind", ["linear", "mlp", "mean"])
@torch.no_grad()
def test_sampled_attention_is_the_layer_at_those_queries(kind):
    torch.manual_seed(1)
    layer = sparse_layers(Policy(PolicyConfig(attention="nsa", nsa={**NSA, "phi": kind}, **SHAPE)))[0]
    torch.nn.init.normal_(layer.phi_k_position)
    torch.nn.init.normal_(layer.gate_proj.weight)
    x = torch.randn(2 * LENGTH, 32)
    policy = Policy(PolicyConfig(**SHAPE))
    cos, sin = policy.model.rope(torch.arange(LENGTH).repeat(2), torch.float32)
    layout = Layout(torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32))
    record = torch.empty(2 * LENGTH, 2, 4, dtype=torch.int32)
    whole = layer(x, cos, sin, layout, None, None, record)
    positions = torch.tensor([0, 7, 40, 64, 92])
    q, branches = layer.project(x, cos, sin)
    padded = [(layout.pad(k), layout.pad(v)) for k, v in branches]
    gates = layer.gates(x).view(2, LENGTH, 2, 2, 3)[:, positions].permute(0, 2, 3, 1, 4)
    query = scaled_queries(layout.pad(q), layer, positions)
    out, importance, _ = sparse_at(query, *padded, gates, positions, layer)
    ours = layer.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, whole.view(2, LENGTH, 32)[:, positions], atol=1e-5, rtol=1e-4)
    chosen = chosen_blocks(importance, positions, layer.nsa)
    for b in range(2):
        for m, t in enumerate(positions.tolist()):
            for head in range(2):
                wanted = sorted(set(record[b * LENGTH + t, head].tolist()) - {-1})
                assert chosen[b, head, m].nonzero().flatten().tolist() == wanted


def test_mass_and_divergence_are_their_formulas_in_float64():
    torch.manual_seed(2)
    config = NSAConfig(**NSA)
    q, k = torch.randn(1, 2, 2, 3, 8), torch.randn(1, 2, LENGTH, 8)
    positions, blocks = torch.tensor([20, 57, 92]), 12
    mass = exact_mass(q @ k[:, :, None].transpose(-1, -2), positions, 8)
    values = torch.randn(1, 2, LENGTH, 5)
    weighted = exact_mass(q @ k[:, :, None].transpose(-1, -2), positions, 8, values)
    importance = torch.rand(1, 2, 3, blocks)
    free = free_blocks(positions, blocks, config)
    terms = []
    for head in range(2):
        for m, t in enumerate(positions.tolist()):
            target, long = [0.0] * blocks, [0.0] * blocks
            for g in range(2):
                logits = [sum((q[0, head, g, m].double() * k[0, head, s].double()).tolist()) for s in range(t + 1)]
                total = sum(math.exp(x) for x in logits)
                for s, x in enumerate(logits):
                    target[s // 8] += math.exp(x) / total
                    long[s // 8] += math.exp(x) / total * math.sqrt(sum(v * v for v in values[0, head, s].tolist()))
            assert mass[0, head, m].tolist() == pytest.approx(target, abs=1e-5)
            assert sum(target) == pytest.approx(2)
            assert weighted[0, head, m].tolist() == pytest.approx(long, abs=1e-5)
            able = list(range(1, t // 8 - 1))  # neither block 0 nor the two newest
            assert free[m].nonzero().flatten().tolist() == able
            if len(able) > 1:
                wanted = [target[j] / sum(target[i] for i in able) for j in able]
                scores = importance[0, head, m].double()
                got = [scores[j].item() / sum(scores[i].item() for i in able) for j in able]
                terms.append(sum(a * math.log(a / b) for a, b in zip(wanted, got, strict=True)))
    assert len(terms) == 4  # at token 20 no block is free
    assert divergence(importance, mass, free).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}])
@torch.no_grad()
def test_the_teacher_is_the_dense_layer(changes):
    dense, sparse = converted(**changes)
    for policy in (dense, sparse):  # biases and norms that are not at their start
        for name, parameter in policy.named_parameters():
            if ("_proj.bias" in name and "gate" not in name) or "_norm" in name:
                generator = torch.Generator().manual_seed(len(name))
                size = (
                    (len(parameter) // 3,) if policy is sparse and name.split(".")[-2] in ("k_proj", "v_proj") else None
                )
                drawn = torch.randn(size or parameter.shape, generator=generator)
                parameter.copy_(drawn.repeat(3) if size else drawn)
    layer, student = dense.model.layers[0].self_attn, Student(sparse_layers(sparse)[0])
    assert isinstance(layer, FullAttention)
    x = torch.randn(2 * LENGTH, 32)
    cos, sin = dense.model.rope(torch.arange(LENGTH).repeat(2), torch.float32)
    layout = Layout(torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32))
    q, exact = student.exact_attention(x, cos, sin, layout)
    torch.testing.assert_close(exact, layer(x, cos, sin, layout, None), atol=1e-5, rtol=1e-4)
    # With gates (0, 1, 0) the student gives the same up to what selection reaches, and something else beyond.
    for positions, equal in ((torch.arange(32), True), (torch.arange(60, LENGTH), False)):
        error = student.losses(x, cos, sin, layout, q, exact, positions)[1]
        assert (error < 1e-9) == equal, error


def random_text(rows: int) -> torch.Tensor:
    return torch.randint(0, 40, (rows, 96), generator=torch.Generator().manual_seed(1))


def with_sinks() -> Policy:
    """A conversion whose queries attend most to token 0 wherever it stands, which a mean of eight keys dilutes."""
    _, sparse = converted(ROOMY, qkv_bias=True)
    with torch.no_grad():
        sparse.model.embed_tokens.weight[:, 31] = 0
        sparse.model.embed_tokens.weight[0] = 4 * torch.eye(32)[31]
        for layer in sparse_layers(sparse):
            layer.q_proj.bias.view(-1, 8)[:, 3] = 6  # a dimension that rotates slowly
            layer.k_proj.weight.view(-1, 8, 32)[:, 3, 31] = 0.5
    return sparse


RECIPE = Recipe(
    context=96,
    tokens_per_step=384,
    tokens_per_microbatch=192,
    layer_steps=100,
    gate_steps=0,
    all_steps=0,
    layer_queries=32,
)


def test_the_layer_stage_raises_recall_and_lowers_both_losses():
    sparse, text = with_sinks(), random_text(206)
    train, held = text[:200], text[200:]
    before, best = attention_recall(sparse, held)
    students, positions = [Student(layer) for layer in sparse_layers(sparse)], torch.arange(96)
    losses = layerwise_step(sparse, students, held, positions, 0.0)
    figures: list[dict[str, float]] = []
    adapt(sparse, train, RECIPE, figures.append)
    after, _ = attention_recall(sparse, held)
    gap = best.mean() - before.mean()
    assert gap > 0.02
    assert after.mean() > before.mean() + 0.25 * gap
    # The students of before: they hold the dense keys and values, and share the layers' own.
    aligned, error = (layerwise_step(sparse, students, held, positions, 0.0) / losses).tolist()
    assert aligned < 0.8
    assert error < 0.5
    assert all(f["stage"] == 1 and f["tokens"] == 384 for f in figures)


def test_the_layer_stage_leaves_the_rest_bitwise_and_skips_trained_gates():
    _, sparse = converted()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    adapt(sparse, random_text(8), replace(RECIPE, layer_steps=2))
    for name, value in sparse.state_dict().items():
        may_change = any(
            part in name for part in (".k_proj.", ".v_proj.", ".gate_proj.bias", "gate_proj.weight", ".phi_")
        )
        if ".mlp." in name or not may_change:
            assert torch.equal(value, before[name]), name
        elif ".k_proj." in name or ".v_proj." in name:
            for part, old in zip(value.chunk(3), before[name].chunk(3), strict=True):
                assert not torch.equal(part, old), name
    assert all(parameter.requires_grad for parameter in sparse.parameters())
    figures: list[dict[str, float]] = []
    adapt(sparse, random_text(8), replace(RECIPE, layer_steps=2, gate_steps=1), figures.append)
    assert [f["stage"] for f in figures] == [2]


def test_gradients_of_microbatches_add_up():
    text, positions = random_text(4), torch.tensor([5, 50, 60, 95])
    gradients, sums = [], []
    for size in (4, 1):
        _, sparse = converted()
        open_gates(sparse, 0.1)
        students = [Student(layer) for layer in sparse_layers(sparse)]
        parts = [layerwise_step(sparse, students, rows, positions, size / 4) * size / 4 for rows in text.split(size)]
        sums.append(sum(parts))
        gradients.append([p.grad for s in students for group in s.groups() for p in group["params"]])
    torch.testing.assert_close(sums[0], sums[1])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # The position of a linear phi adds the same to all compressed keys.
    assert sum(a is None for a in gradients[0]) == 2


@torch.no_grad()
def test_recall_is_measured_on_the_blocks_that_the_policy_chooses():
    _, sparse = converted()
    open_gates(sparse, 0.1)
    ids = torch.randint(0, 40, (LENGTH,), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([40, 92])
    record = sparse.new_record(LENGTH)
    sparse.model.run(ids, torch.tensor([0, LENGTH], dtype=torch.int32), record=record)
    mass, chosen, best = block_choices(sparse, ids, positions)
    assert mass.shape == (2, 2, 2, 12)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 2, 2))
    for m, t in enumerate(positions.tolist()):
        for layer in range(2):
            for head in range(2):
                wanted = sorted(set(record[t, layer, head].tolist()) - {-1})
                assert chosen[layer, head, m].nonzero().flatten().tolist() == wanted
                order = mass[layer, head, m].argsort(descending=True).tolist()
                forced = [0, t // 8 - 1, t // 8]
                free = [j for j in order if j not in forced][:1]  # one of four is left to choose
                assert best[layer, head, m].nonzero().flatten().tolist() == sorted({*forced, *free})
    share, limit = attention_recall(sparse, ids[None], queries=5)
    assert share.shape == limit.shape == (1, 2)
    assert bool((share <= limit + 1e-6).all())
    assert bool((limit < 1).all())
    question = Needle(ids[:90], ids[90:], 0.3, start=26, stop=33)  # blocks 3 and 4
    seen = needle_recall(sparse, [question])
    mass, chosen, best = block_choices(sparse, ids, torch.tensor([89, 90, 91]))
    torch.testing.assert_close(seen.mass[0], mass[..., 3:5].sum(-1).mean((1, 2)))
    torch.testing.assert_close(seen.held[0], (mass * chosen)[..., 3:5].sum(-1).mean((1, 2)))
    torch.testing.assert_close(seen.best[0], (mass * best)[..., 3:5].sum(-1).mean((1, 2)))
    torch.testing.assert_close(seen.chosen[0], chosen[..., 3:5].float().mean((1, 2, 3)))
    with pytest.raises(ValueError, match="longer than 32"):
        attention_recall(sparse, ids[None, :32])
    with pytest.raises(ValueError, match="full attention"):
        block_choices(converted()[0], ids, positions)


def test_bfloat16_gradients_point_the_same_way():
    gradients = []
    for enabled in (False, True):
        sparse = with_sinks()
        open_gates(sparse, 0.1)
        students = [Student(layer) for layer in sparse_layers(sparse)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            layerwise_step(sparse, students, random_text(4), torch.arange(20, 96, 3), 1.0)
        gradients.append([p.grad for s in students for group in s.groups() for p in group["params"]])
    for exact, rounded in zip(*gradients, strict=True):
        if exact is not None:
            assert rounded is not None
            assert rounded.dtype == torch.float32
            assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.9
