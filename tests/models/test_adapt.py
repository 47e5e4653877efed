"""Adaptation trains what it says, the alignment loss is its formula, and needles are what greedy decoding finds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from plumbline.kernels.nsa import Layout
from plumbline.models.adapt import (
    Recipe,
    _positions,
    _whole_stage,
    adapt,
    alignment_loss,
    batches,
    default_rate,
    mean_gates,
    open_gates,
    sparse_layers,
)
from plumbline.models.attention import Seen, open_gate_bias
from plumbline.models.config import PolicyConfig
from plumbline.models.distil import dense_policy
from plumbline.models.longcontext import Estimate, find_needles, needles, token_losses, windows
from plumbline.models.policy import Policy

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}


def make(attention: str = "nsa", **changes) -> Policy:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.15,
    }
    policy = Policy(PolicyConfig(attention=attention, nsa=NSA, **{**shape, **changes})).eval()
    for layer in sparse_layers(policy):  # as conversion leaves it
        torch.nn.init.zeros_(layer.gate_proj.weight)
        layer.gate_proj.bias.data.copy_(open_gate_bias(layer.heads))
    return policy


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 40 for letter in text]}


def test_alignment_is_the_divergence_of_block_masses():
    policy = make(qkv_bias=True)
    layer = sparse_layers(policy)[0]
    for parameter in (layer.phi_k_weight, layer.k_proj.weight, layer.k_proj.bias):
        torch.nn.init.normal_(parameter, std=0.15)
    length = 70
    x = torch.randn(2 * length, 32, requires_grad=True)
    layout = Layout(torch.tensor([0, length, 2 * length], dtype=torch.int32))
    cos, sin = policy.model.rope(torch.arange(length).repeat(2), x.dtype)
    q, ((k_cmp, _), (k_slc, v_slc), _) = layer.project(x, cos, sin)
    seen = Seen(x, cos, sin, q, k_cmp, k_slc, v_slc, layout)
    positions = torch.tensor([3, 30, 41, 69])
    loss = alignment_loss(layer, seen, positions)
    q, k_cmp, k_slc, v_slc = (part.detach() for part in seen[3:7])

    terms = []
    for start in (0, length):
        for head in range(2):
            block_keys = []
            for first in range(0, length - 8 + 1, 4):
                tokens = k_cmp[start + first : start + first + 8, head].double()
                block_keys.append(sum(tokens[i] @ layer.phi_k_weight[head, i].double() for i in range(8)))
            for t in positions.tolist():
                mass, score = torch.zeros(9, dtype=torch.double), torch.zeros(9, dtype=torch.double)
                for query in q[start + t, head * 2 : head * 2 + 2].double():
                    exact = (k_slc[start : start + t + 1, head].double() @ query / math.sqrt(8)).softmax(0)
                    for s, p in enumerate(exact):
                        mass[s // 8] += p * v_slc[start + s, head].double().norm()
                    whole = [i for i in range(len(block_keys)) if 4 * i + 7 <= t]
                    if whole:
                        p = torch.stack([block_keys[i] @ query for i in whole]).div(math.sqrt(8)).softmax(0)
                        for j in range(9):
                            for m in range(2):
                                for n in range(2):
                                    if 2 * j + m - n in whole:
                                        score[j] += p[whole.index(2 * j + m - n)]
                free = list(range(1, t // 8 - 1))  # neither block 0 nor the two newest
                if len(free) > 1:
                    mass, score = mass[free] / mass[free].sum(), score[free] / score[free].sum()
                    terms.append((mass * (mass.log() - score.log())).sum())
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), atol=1e-5, rtol=1e-4)
    loss.backward()
    given = {name for name, value in layer.named_parameters() if value.grad is not None and value.grad.any()}
    assert (
        {"phi_k_weight", "k_proj.weight"} <= given <= {"phi_k_weight", "phi_k_position", "k_proj.weight", "k_proj.bias"}
    )
    assert not layer.k_proj.weight.grad[16:].any()  # the compressed branch has the first of three parts
    assert x.grad is None
    assert alignment_loss(layer, seen, torch.tensor([3, 20])) == 0


def test_gates_open_once():
    policy = make()
    assert open_gates(policy, 0.1)
    gates = sparse_layers(policy)[0].gates(torch.randn(5, 32))
    torch.testing.assert_close(gates, torch.tensor([0.1, 0.8, 0.1]).expand(5, 4, 3))
    assert not open_gates(policy, 0.2)


def copies(rows: int, length: int) -> torch.Tensor:
    """Random tokens repeated with a period of 48, beyond what window and forced blocks see."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 40, (rows, 48), generator=generator).repeat(1, 1 + length // 48)[:, :length]


RECIPE = Recipe(
    context=96,
    tokens_per_step=384,
    tokens_per_microbatch=192,
    layer_steps=0,
    gate_steps=6,
    all_steps=0,
    alignment_queries=32,
    new_learning_rate=5e-3,
    learning_rate=2e-3,
)


def test_gate_stage_trains_gates_and_phi_alone_and_lowers_alignment():
    policy = make()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    figures: list[dict[str, float]] = []
    adapt(policy, copies(8, 96), replace(RECIPE, gate_steps=25), figures.append)
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    # A position of a linear phi adds one vector to all compressed keys, which no softmax sees.
    assert {name.split("self_attn.")[-1] for name in changed} - {"phi_k_position"} == {
        *("gate_proj.weight", "gate_proj.bias", "phi_k_weight", "phi_v_weight", "phi_v_position")
    }
    assert sum(f["alignment"] for f in figures[-5:]) < 0.8 * sum(f["alignment"] for f in figures[:5])
    assert not policy.training
    assert all(layer.observer is None for layer in sparse_layers(policy))


def test_without_a_teacher_the_last_stage_trains_everything_on_the_text():
    policy = make()
    open_gates(policy, 0.01)  # no fresh conversion, so what it was made of is gone
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    figures: list[dict[str, float]] = []
    adapt(policy, copies(8, 96), replace(RECIPE, gate_steps=2, all_steps=30), figures.append)
    assert [f["stage"] for f in figures] == [2] * 2 + [3] * 30
    for name, value in policy.named_parameters():
        assert "phi_k_position" in name or not torch.equal(value, before[name]), name
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.3
    gates = mean_gates(policy, copies(2, 96))
    assert gates.shape == (2, 3)
    assert 0 < gates.min() < gates.max() < 1


def test_a_conversion_learns_the_dense_distributions_and_not_the_text():
    policy, rows = make(), copies(8, 96)
    teacher, before = dense_policy(policy), divergence(dense_policy(policy), policy, rows)
    recipe = replace(RECIPE, gate_steps=2, all_steps=40)
    figures: list[dict[str, float]] = []
    adapt(policy, rows, recipe, figures.append)
    assert [f["stage"] for f in figures] == [2] * 2 + [3] * 40
    first, last = (sum(f["divergence"] for f in part) / 5 for part in (figures[:5], figures[-5:]))
    assert last < 0.85 * first
    # By itself, without repeats.
    assert divergence(teacher, policy, rows) < 0.9 * before
    # The same with the teacher given; and from far away, towards it.
    again, records = make(), []
    adapt(again, rows, recipe, records.append, teacher=teacher)
    assert [r["divergence"] for r in records] == [f["divergence"] for f in figures]
    unlike = make(initializer_range=0.05)
    before = divergence(teacher, unlike, rows)
    adapt(unlike, rows, recipe, teacher=teacher)
    assert divergence(teacher, unlike, rows) < 0.7 * before


def divergence(teacher: Policy, policy: Policy, rows: torch.Tensor) -> float:
    ends = torch.arange(len(rows) + 1, dtype=torch.int32) * rows.shape[1]
    with torch.no_grad():
        p, q = (torch.log_softmax(m(rows.flatten(), ends), -1) for m in (teacher, policy))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_compared_positions_are_half_in_repeats():
    repeated = torch.arange(700, 760)
    long = replace(RECIPE, context=8192, tokens_per_step=8192, tokens_per_microbatch=8192)
    positions = _positions(long, 200, repeated, torch.device("cpu"))
    inside = ((positions >= 700) & (positions < 760)).sum()
    assert 100 <= inside <= 110
    assert positions.tolist() == sorted(positions.tolist())
    assert len(_positions(RECIPE, 31, repeated[:0], torch.device("cpu"))) == 31


def test_the_clock_ends_all_stages():
    figures: list[dict[str, float]] = []
    endless = replace(RECIPE, layer_steps=10**6, gate_steps=10**6, all_steps=10**6, minutes=0.03)
    adapt(make(), copies(8, 96), endless, figures.append)
    assert {f["stage"] for f in figures} == {1, 2, 3}
    # The last step begins before the time is over, where a step takes long well before.
    assert figures[-1]["rate"] < 0.6


def test_the_rate_falls_with_the_width():
    assert [default_rate(width) for width in (64, 576, 1152)] == [1e-3, 1e-3, 5e-4]
    assert _whole_stage(make(), replace(RECIPE, learning_rate=None), None)[0][1]["lr"] == 1e-3
    assert _whole_stage(make(), RECIPE, None)[0][1]["lr"] == RECIPE.learning_rate


@pytest.mark.parametrize(("steps", "rising"), [(4, 10), (40, 10), (200, 20)])
def test_the_rate_rises_for_a_tenth_of_a_stage_and_ten_steps_at_least(steps, rising):
    figures: list[dict[str, float]] = []
    small = replace(RECIPE, tokens_per_step=192, gate_steps=steps, alignment=0.0)
    adapt(make(), copies(2, 96), small, figures.append)
    for step, made in enumerate(figures):
        falling = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        assert made["rate"] == pytest.approx(min(1, (step + 1) / rising) * falling)


def test_bad_recipes_are_refused_by_name():
    with pytest.raises(ValueError, match="tokens_per_step"):
        Recipe(context=100, tokens_per_step=250)
    with pytest.raises(ValueError, match="gate_share"):
        Recipe(gate_share=0.5)
    with pytest.raises(ValueError, match="nsa attention"):
        adapt(make("full"), copies(8, 96), RECIPE)
    with pytest.raises(ValueError, match="repeat_share"):
        Recipe(repeat_share=1)
    with pytest.raises(ValueError, match="repeat_length"):
        Recipe(repeat_length=1)
    with pytest.raises(ValueError, match="a teacher has full attention, this one has nsa"):
        adapt(make(), copies(8, 96), RECIPE, teacher=make())
    with pytest.raises(ValueError, match="the teacher has 41 tokens, the policy 40"):
        adapt(make(), copies(8, 96), RECIPE, teacher=make("full", vocab_size=41))
    with pytest.raises(ValueError, match="windows have 80 tokens"):
        adapt(make(), copies(8, 80), RECIPE)


def test_every_window_is_seen_once_before_any_is_seen_twice():
    rows = torch.arange(10)[:, None]
    stream = batches(rows, 4, seed=3)
    seen = torch.cat([next(stream) for _ in range(5)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    # The second time round the text is cut elsewhere, and is the same text.
    longer = torch.arange(60).view(10, 6)
    stream = batches(longer, 10, seed=3)
    first, second = next(stream), next(stream)
    assert sorted(first.tolist()) == longer.tolist()
    assert sorted(second.flatten().tolist()) == list(range(60))
    assert all(row.diff().remainder(60).eq(1).all() for row in second)
    assert second[0, 0] % 6


def test_needles_are_what_greedy_decoding_finds():
    policy = make("full", vocab_size=40)
    text = torch.randint(0, 40, (3000,), generator=torch.Generator().manual_seed(2))
    questions = needles([text], Letters(), 260, 6)
    for question, depth in zip(questions, (0.1, 0.3, 0.5, 0.7, 0.9, 0.1), strict=True):
        assert len(question.prompt) + len(question.answer) == 260
        assert question.depth == depth
        words = Letters()("The special magic number for ")["input_ids"]
        assert question.prompt[question.start + 1 :][: len(words)].tolist() == words
        assert question.prompt[: question.stop][-len(question.answer) - 2 : -2].tolist() == question.answer.tolist()
        digits = Letters()(" 0123456789")["input_ids"]
        assert question.answer[0] == digits[0]
        assert set(question.answer[1:].tolist()) <= set(digits[1:])
        inside = question.prompt.unfold(0, 8, 1)
        assert (inside == question.answer).all(1).sum() == 1
    found, losses = find_needles(policy, questions, tokens_at_once=600)
    for question, hit, loss in zip(questions, found.tolist(), losses.tolist(), strict=True):
        size = len(question.answer)
        out = policy.generate(question.prompt[None], max_new_tokens=size, do_sample=False, eos_token_id=None)
        assert hit == (out[0, -size:].tolist() == question.answer.tolist())
        row = torch.cat([question.prompt, question.answer])[None]
        assert loss == pytest.approx(token_losses(policy, row)[0, -size:].mean().item(), abs=1e-4)
    # With the policy's own next token as the answer, every question is answered.
    for question in questions:
        ends = torch.tensor([0, len(question.prompt)], dtype=torch.int32)
        own = policy(question.prompt, ends)[-1:].argmax(-1)
        assert find_needles(policy, [replace(question, answer=own)])[0].all()
    with pytest.raises(ValueError, match="more text"):
        needles([text[:100]], Letters(), 260, 1)


def test_windows_and_intervals():
    rows = windows([torch.arange(10), torch.arange(25)], 10)
    assert rows.tolist() == [list(range(10)), list(range(10)), list(range(10, 20))]
    with pytest.raises(ValueError, match="no text has 11 tokens"):
        windows([torch.arange(10)], 11)
    share = Estimate.of_share(0, 20)
    assert (share.mean, share.low, round(share.high, 3)) == (0, 0, 0.161)
    mean = Estimate.of(torch.tensor([1.0, 3.0]))
    assert mean.mean == 2
    assert mean.high - mean.mean == pytest.approx(12.706, abs=1e-3)  # t with one degree of freedom
