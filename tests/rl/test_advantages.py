"""Advantages against their formulas, in float64, one prompt at a time."""

import pytest
import torch

from plumbline.rl.advantages import (
    dr_grpo,
    gae,
    grpo,
    reinforce_pp,
    reinforce_pp_baseline,
    reinforce_pp_tokens,
    rloo,
    token_rewards,
    whiten,
)

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 0.5, 1.0, -0.5]], dtype=torch.float64)


def test_grpo_standardises_each_group():
    result = grpo(REWARDS)
    for row, rewards in zip(result, REWARDS, strict=True):
        mean = sum(rewards) / 4
        spread = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
        torch.testing.assert_close(row, (rewards - mean) / (spread + 1e-4))


def test_equal_rewards_give_zero_everywhere():
    # 0.7 has no exact mean; the advantages are exactly zero all the same.
    for dtype in (torch.float32, torch.float64):
        equal = torch.full((3, 5), 0.7, dtype=dtype)
        for function in (grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline):
            assert (function(equal) == 0).all(), function.__name__


def test_dr_grpo_and_rloo_baselines():
    for p in range(3):
        for g in range(4):
            others = [REWARDS[p, j] for j in range(4) if j != g]
            torch.testing.assert_close(rloo(REWARDS)[p, g], REWARDS[p, g] - sum(others) / 3)
            torch.testing.assert_close(dr_grpo(REWARDS)[p, g], REWARDS[p, g] - REWARDS[p].mean())


def test_reinforce_pp_normalises_over_the_batch():
    flat = [float(r) for r in REWARDS.flatten()]
    mean = sum(flat) / 12
    spread = (sum((r - mean) ** 2 for r in flat) / 11) ** 0.5
    torch.testing.assert_close(reinforce_pp(REWARDS), (REWARDS - mean) / (spread + 1e-8))
    centred = torch.stack([row - sum(row) / 4 for row in REWARDS])
    spread = (sum(float(r) ** 2 for r in centred.flatten()) / 11) ** 0.5
    torch.testing.assert_close(reinforce_pp_baseline(REWARDS), centred / (spread + 1e-8))


def test_the_kl_of_each_token_in_the_reward():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    divergence = torch.tensor([[0.1, -0.2, 0.3, 9.0], [0.5, 0.25, 9.0, 9.0]], dtype=torch.float64)
    rewards = torch.tensor([1.0, -1.0], dtype=torch.float64)
    result = token_rewards(rewards, mask, divergence, 0.5)
    expected = torch.tensor([[-0.05, 0.1, 0.85, 0], [-0.25, -1.125, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(result, expected)
    to_go = torch.tensor([0.9, 0.95, 0.85, -1.375, -1.125], dtype=torch.float64)
    normalised = (to_go - to_go.mean()) / (to_go.std() + 1e-8)
    advantages = reinforce_pp_tokens(result, mask)
    torch.testing.assert_close(advantages[mask], normalised)
    assert (advantages[~mask] == 0).all()
    # Undiscounted GAE without a critic is the same return to go.
    alone, _ = gae(result, torch.zeros_like(result), mask, 1.0, 1.0)
    torch.testing.assert_close(alone[mask], to_go)
    with pytest.raises(ValueError, match="no token"):
        whiten(result, torch.zeros_like(mask))


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 4, dtype=torch.int64)])
def test_wrong_groups_are_refused(bad):
    with pytest.raises(ValueError, match="rewards must be"):
        grpo(bad)


def test_gae_matches_the_recursion_and_skips_masked_positions():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0]], dtype=torch.bool)
    gamma, lam = 0.9, 0.8
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(2):
        places = [t for t in range(6) if mask[row, t]]
        running, following = 0.0, 0.0
        for t in reversed(places):
            delta = rewards[row, t] + gamma * following - values[row, t]
            running = delta + gamma * lam * running
            following = values[row, t]
            torch.testing.assert_close(advantages[row, t], running)
            torch.testing.assert_close(returns[row, t], running + values[row, t])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    with pytest.raises(ValueError, match="one shape"):
        gae(rewards, values[:, :3], mask)
