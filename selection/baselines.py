"""What one would compare LIM with: from reward curves [N, K] to scores [N], higher = keep first, NaN = no score."""

from __future__ import annotations

import numpy as np


def random_scores(count: int, seed: int) -> np.ndarray:
    """A random order, the same for the same seed and count."""
    return np.random.default_rng(seed).permutation(count).astype(np.float64)


def linear_scores(curves: np.ndarray) -> np.ndarray:
    """LINEAR (arXiv 2502.11886): consistency of progress, kept from 0.7 on.

    The paper describes it in words ("steady improvement") and gives no formula; here it is Pearson's correlation of a
    sample's rewards with the epoch, over the epochs it has: 1 is a steady rise, 0 no trend (or a constant curve), -1 a
    steady fall. NaN for a sample with fewer than two epochs.
    """
    values = np.asarray(curves, dtype=np.float64)
    seen = ~np.isnan(values)
    n = seen.sum(axis=1)
    epoch = np.where(seen, np.arange(values.shape[1], dtype=np.float64), 0.0)
    reward = np.where(seen, values, 0.0)
    safe = np.maximum(n, 1)[:, None]
    epoch = np.where(seen, epoch - epoch.sum(axis=1, keepdims=True) / safe, 0.0)
    reward = np.where(seen, reward - reward.sum(axis=1, keepdims=True) / safe, 0.0)
    spread = np.sqrt((epoch**2).sum(axis=1) * (reward**2).sum(axis=1))
    # A constant curve may be off its own mean by rounding; that is no trend.
    flat = (reward**2).sum(axis=1) <= 1e-24 * safe[:, 0]
    scores = np.divide((epoch * reward).sum(axis=1), spread, out=np.zeros(len(values)), where=~flat & (spread > 0))
    return np.where(n >= 2, scores, np.nan)


def pass_rates(curves: np.ndarray) -> np.ndarray:
    """Success in the first epoch: the k-rollout filter, which needs no training run. NaN where it was not seen then."""
    return np.asarray(curves, dtype=np.float64)[:, 0].copy()


def success_variance(curves: np.ndarray) -> np.ndarray:
    """Variance of success over epochs (1-shot RLVR, arXiv 2504.20571). NaN for a sample without an epoch."""
    values = np.asarray(curves, dtype=np.float64)
    seen = ~np.isnan(values)
    n = np.maximum(seen.sum(axis=1), 1)
    mean = np.where(seen, values, 0.0).sum(axis=1) / n
    error = np.where(seen, values - mean[:, None], 0.0)
    return np.where(seen.any(axis=1), (error**2).sum(axis=1) / n, np.nan)


def bernoulli_variance(curves: np.ndarray) -> np.ndarray:
    """p (1 - p) of the success rate p over all epochs: largest at one half. NaN for a sample without an epoch."""
    values = np.asarray(curves, dtype=np.float64)
    seen = ~np.isnan(values)
    p = np.where(seen, values, 0.0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return np.where(seen.any(axis=1), p * (1 - p), np.nan)


def guess_scores(curves: np.ndarray) -> np.ndarray:
    """Kimi k1.5's guess filter (arXiv 2501.12599), on the history of a run that answers without reasoning.

    1 where no try of the first epoch was right (keep), less by the share that was. The paper takes N = 8 tries, so
    record 8 rollouts a sample. NaN where a sample was not tried.
    """
    return 1.0 - pass_rates(curves)
