"""Drawing tokens: the right distribution, and draws that depend on their own sequence alone."""

import torch

from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.rollout.sampler import draw, sequence_key, uniforms


def keys(count):
    prompt = Prompt(0, "p", [1], "", "")
    return torch.tensor([sequence_key(7, prompt, number) for number in range(count)])


def test_uniforms_are_uniform_and_reproducible():
    k = keys(200)[:, None].expand(-1, 100).flatten()
    positions = torch.arange(100).repeat(200)
    u = uniforms(k, positions)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared, 19 degrees of freedom
    torch.testing.assert_close(u, uniforms(k, positions), rtol=0, atol=0)


def test_frequencies_follow_the_tempered_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    tokens, logprobs = draw(logits, Sampling(1, temperature=0.5), keys(20_000), torch.zeros(20_000, dtype=torch.int64))
    expected = torch.softmax(logits[0] / 0.5, -1)
    observed = torch.bincount(tokens, minlength=4) / 20_000
    assert (observed - expected).abs().max() < 0.01
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_top_p_keeps_the_smallest_set_with_that_mass():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(5_000, 1)
    tokens, _ = draw(logits, Sampling(1, top_p=0.75), keys(5_000), torch.zeros(5_000, dtype=torch.int64))
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_takes_the_maximum():
    torch.manual_seed(0)
    logits = torch.randn(50, 11)
    tokens, logprobs = draw(logits, Sampling(1, temperature=0), keys(50), torch.zeros(50, dtype=torch.int64))
    assert (tokens == logits.argmax(-1)).all()
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).max(-1).values)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]).repeat(2_000, 1)
    tokens, _ = draw(logits, Sampling(1), keys(2_000), torch.zeros(2_000, dtype=torch.int64))
    assert set(tokens.tolist()) == {1, 3}


def test_a_draw_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    logits, positions = torch.randn(30, 17), torch.arange(30)
    together, _ = draw(logits, Sampling(1), keys(30), positions)
    alone = [
        draw(logits[i : i + 1], Sampling(1), keys(30)[i : i + 1], positions[i : i + 1])[0].item() for i in range(30)
    ]
    assert together.tolist() == alone


def test_keys_differ_by_seed_step_epoch_sample_and_number():
    base = Prompt(0, "p", [1], "", "", epoch=0, key=1)
    others = [
        sequence_key(2, base, 0),
        sequence_key(1, Prompt(0, "q", [1], "", "", epoch=0, key=1), 0),
        sequence_key(1, Prompt(0, "p", [1], "", "", epoch=1, key=1), 0),
        sequence_key(1, Prompt(0, "p", [1], "", "", epoch=0, key=2), 0),
        sequence_key(1, base, 1),
    ]
    assert len({sequence_key(1, base, 0), *others}) == 6
