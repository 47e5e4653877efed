"""The importance ratio between the policy that learns and the one it learns from, a token or a sequence at a time."""

from typing import Literal

from torch import Tensor


def importance_ratio(difference: Tensor, mask: Tensor, level: Literal["token", "sequence"]) -> Tensor:
    """rho_t = exp(d_t) (PPO, arXiv 1707.06347), or s = exp(mean_t d_t) for all of a sequence (GSPO, arXiv 2507.18071, eq. 7).

    Args:
        difference: [B, T] float, log pi - log pi_old, 0 outside the mask.
        mask: [B, T] bool or 0/1, True on completion tokens.
        level: `token` or `sequence`.

    Returns:
        [B, T]; constant along a sequence for `sequence`.
    """
    if level == "token":
        return difference.exp()
    lengths = mask.to(difference.dtype).sum(1, keepdim=True).clamp(min=1)
    return (difference.sum(1, keepdim=True) / lengths).exp().expand_as(difference)
