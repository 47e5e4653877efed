"""Estimators of the KL divergence from the policy to a reference (J. Schulman, "Approximating KL divergence", 2020)."""

from typing import Literal

from torch import Tensor


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens sampled from the policy, with d = log pi - log ref.

    k1 = d (unbiased, high variance); k2 = d^2 / 2 (biased, its gradient is the KL's); k3 = exp(-d) - 1 + d (unbiased,
    never negative; what GRPO uses).

    Args:
        logprobs, ref_logprobs: same shape, float.
        estimator: `k1`, `k2` or `k3`.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: unknown estimator or unequal shapes.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs {list(logprobs.shape)} and ref_logprobs {list(ref_logprobs.shape)} differ in shape")
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")
