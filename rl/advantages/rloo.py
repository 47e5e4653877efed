"""RLOO (arXiv 2402.14740): each completion against the mean of the others."""

from torch import Tensor

from plumbline.rl.advantages.grpo import centre, check_groups


def rloo(rewards: Tensor) -> Tensor:
    """A_pg = r_pg - mean of r_pj over j != g: an unbiased baseline, G / (G - 1) times Dr.GRPO's.

    Args:
        rewards: [P, G] float; G >= 2.

    Returns:
        [P, G] advantages.

    Raises:
        ValueError: rewards is not [P, G >= 2].
    """
    check_groups(rewards)
    group = rewards.shape[1]
    return centre(rewards) * (group / (group - 1))
