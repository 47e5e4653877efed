"""Advantages against their formulas, in float64, one prompt at a time."""

import pytest
import torch

from plumbline.rl.advantages import dr_grpo, gae, grpo, reinforce_pp, rloo

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 0.5, 1.0, -0.5]], dtype=torch.float64)


def test_grpo_standardises_each_group():
    result = grpo(REWARDS)
    for row, rewards in zip(result, REWARDS, strict=True):
        mean = sum(rewards) / 4
        spread = (sum((r - mean) ** 2 for r in rewards) / 3) ** 0.5
        torch.testing.assert_close(row, (rewards - mean) / (spread + 1e-4))


def test_equal_rewards_give_zero_everywhere():
    equal = torch.full((3, 5), 0.7, dtype=torch.float64)
    for function in (grpo, dr_grpo, rloo, reinforce_pp):
        torch.testing.assert_close(function(equal), torch.zeros_like(equal), atol=1e-9, rtol=0)


def test_dr_grpo_and_rloo_baselines():
    for p in range(3):
        for g in range(4):
            others = [REWARDS[p, j] for j in range(4) if j != g]
            torch.testing.assert_close(rloo(REWARDS)[p, g], REWARDS[p, g] - sum(others) / 3)
            torch.testing.assert_close(dr_grpo(REWARDS)[p, g], REWARDS[p, g] - REWARDS[p].mean())


def test_reinforce_pp_has_unit_spread_over_the_batch():
    result = reinforce_pp(REWARDS)
    assert abs(result.mean()) < 1e-12
    assert abs(result.std() - 1) < 1e-6


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
