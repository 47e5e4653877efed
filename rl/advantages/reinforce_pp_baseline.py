"""REINFORCE++-baseline (arXiv 2501.03262): the group's mean as baseline, the whole batch's spread as scale."""

from torch import Tensor

from plumbline.rl.advantages.grpo import centre, check_groups


def reinforce_pp_baseline(rewards: Tensor, eps: float = 1e-8) -> Tensor:
    """A = (r - mean_p) / (std over the batch of r - mean_p, + eps).

    The spread comes from all prompts at once, so one group of nearly equal rewards is not blown up (as it is in GRPO).

    Args:
        rewards: [P, G] float; G >= 2.
        eps: keeps a batch of equal rewards at zero.

    Returns:
        [P, G] advantages.

    Raises:
        ValueError: rewards is not [P, G >= 2].
    """
    check_groups(rewards)
    centred = centre(rewards)
    return centred / (centred.std() + eps)
