"""CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4-5): REINFORCE weighted by a clipped ratio that carries no gradient."""

from torch import Tensor


def cispo_surrogate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-stop_gradient(clip(rho, 1 - low, 1 + high)) A log pi: every token keeps a gradient, also beyond the clip.

    Args:
        ratio, logprobs: [B, T]; advantages: [B, 1] or [B, T].
        low, high: the paper leaves the floor open (low = 1) and tunes high alone.

    Returns:
        [B, T] loss of each token.
    """
    return -ratio.detach().clamp(1 - low, 1 + high) * advantages * logprobs
