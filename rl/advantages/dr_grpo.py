"""Dr.GRPO (arXiv 2503.20783): the group mean as baseline, without dividing by the group's spread."""

from torch import Tensor

from plumbline.rl.advantages.grpo import centre, check_groups


def dr_grpo(rewards: Tensor) -> Tensor:
    """A_pg = r_pg - mean_p: dividing by the spread would weigh very easy and very hard prompts up.

    Args:
        rewards: [P, G] float; G >= 2.

    Returns:
        [P, G] advantages. Pair with the loss aggregation `constant`.

    Raises:
        ValueError: rewards is not [P, G >= 2].
    """
    check_groups(rewards)
    return centre(rewards)
