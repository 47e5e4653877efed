"""Loss-to-loss scaling: which data should the next run use? (arXiv 2502.12120; fitted as in arXiv 2411.12925)

Between two losses of the same models (train, validation, downstream), or of models trained alike on two data sets,

    L_y = K (L_x - E_x)^kappa + E_y

E_x and E_y are what no model of the family gets below; they come from scaling laws (scaling_law.py), or from
`fit_offsets` where sizes and token counts are not known. K and kappa are ordinary least squares of log(y - E_y) on
log(x - E_x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import f as f_distribution

from plumbline.selection.scaling_law import ScalingLaw, checked, fit_scaling_law

__all__ = [
    "Interval",
    "LossToLoss",
    "OneLine",
    "ScalingLaw",
    "bootstrap_loss_to_loss",
    "drawn",
    "fit_loss_to_loss",
    "fit_offsets",
    "fit_scaling_law",
    "one_line_or_two",
    "straight_line",
]

# Kass and Raftery's "barely worth a mention" ends about here for differences of AIC.
AS_GOOD = 2.0
# E fitted to the pairs stays this far below the lowest loss, where one point would decide everything.
TOP_SHARE = 0.98
OFFSET_ZOOMS = 8


@dataclass(frozen=True)
class LossToLoss:
    """A fitted line in the logarithms.

    Attributes:
        K, kappa: as in the formula.
        e_x, e_y: the irreducible losses it was fitted with.
        r2: share of the variance of y explained, in the unit of the loss.
        n: points.
        residual: root mean square of log(y - E_y) about the line.
    """

    K: float
    kappa: float
    e_x: float
    e_y: float
    r2: float
    n: int
    residual: float

    def predict(self, x: np.ndarray | float) -> np.ndarray:
        """L_y at L_x. Raises ValueError where L_x does not exceed E_x."""
        gap = np.asarray(x, dtype=float) - self.e_x
        if (gap <= 0).any():
            raise ValueError(
                f"x = {np.min(x):.4g} does not exceed E_x = {self.e_x:.4g}, below which the fit says nothing"
            )
        return self.K * gap**self.kappa + self.e_y


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval. `failed` resamples of `resamples` gave no fit and are left out."""

    value: float
    low: float
    high: float
    resamples: int
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class OneLine:
    """Whether two groups lie on one line.

    Attributes:
        p_value: of the F test of two lines against one; small means two.
        gap: by how much the second group's y lies over the first's at the same x, averaged over the x both cover, in
            the unit of the loss; NaN if they cover none.
        n: points of the two groups.
        shared: the range of x that both cover, or None.
    """

    p_value: float
    gap: Interval
    n: tuple[int, int]
    shared: tuple[float, float] | None


def fit_loss_to_loss(x: np.ndarray, y: np.ndarray, e_x: float, e_y: float) -> LossToLoss:
    """Fit K and kappa.

    Args:
        x, y: [n] losses in pairs.
        e_x, e_y: irreducible losses, each below every loss of its side, in the same unit.

    Raises:
        ValueError: lengths differ, fewer than 3 points, losses that are not finite and positive, E not below them, or
            all x alike.
    """
    x, y = checked("x", x), checked("y", y)
    if len(x) != len(y):
        raise ValueError(f"x and y have {len(x)} and {len(y)} values; they must pair up")
    if len(x) < 3:
        raise ValueError(f"a line and its error need at least 3 points, got {len(x)}")
    for name, values, e in (("x", x, e_x), ("y", y, e_y)):
        if not np.isfinite(e) or e < 0:
            raise ValueError(f"e_{name} must be finite and at least 0, got {e}")
        if values.min() <= e:
            low = np.argmin(values)
            raise ValueError(f"e_{name} = {e:.6g} is not below every {name}: row {low + 1} is {values[low]:.6g}")
    u, v = np.log(x - e_x), np.log(y - e_y)
    if np.ptp(u) < 1e-12:
        raise ValueError("every x is the same; nothing can be fitted")
    centred = u - u.mean()
    kappa = float(centred @ v / (centred @ centred))
    intercept = float(v.mean() - kappa * u.mean())
    error = v - intercept - kappa * u
    missed = y - e_y - np.exp(v - error)
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(missed @ missed) / spread if spread > 0 else float("nan")
    return LossToLoss(
        float(np.exp(intercept)), kappa, float(e_x), float(e_y), r2, len(x), float(np.sqrt(np.mean(error**2)))
    )


def fit_offsets(x: np.ndarray, y: np.ndarray) -> tuple[float, float, list[str]]:
    """E_x and E_y from the pairs alone, where no scaling law can give them.

    Least squares of y over K, kappa, E_x, E_y, on a grid of (E_x, kappa) that zooms in. Four parameters of one gentle
    curve are seldom determined by it: whatever is at a bound, or traded off, is said.

    Returns:
        (E_x, E_y, warnings).

    Raises:
        ValueError: as fit_loss_to_loss.
    """
    fit_loss_to_loss(x, y, 0.0, 0.0)
    x, y = checked("x", x), checked("y", y)
    warnings = []
    if len(x) < 8:
        warnings.append(f"{len(x)} points cannot hold K, kappa, E_x and E_y; E is set to 0")
        return 0.0, 0.0, warnings

    shares, kappas = np.linspace(0, TOP_SHARE, 25), np.geomspace(0.1, 8, 33)
    for _ in range(OFFSET_ZOOMS):
        cost = _offset_cost(x, y, shares, kappas)[0]
        i, j = np.unravel_index(np.argmin(cost), cost.shape)
        share, kappa = shares[i], kappas[j]
        step = shares[1] - shares[0]
        ratio = kappas[1] / kappas[0]
        # Wide of the best cell: E_x and kappa trade off along a valley that runs across cells.
        shares = np.clip(np.linspace(share - 4 * step, share + 4 * step, 25), 0, TOP_SHARE)
        kappas = np.geomspace(kappa / ratio**4, kappa * ratio**4, 33)
    e_y = float(_offset_cost(x, y, np.array([share]), np.array([kappa]))[1][0, 0])
    if share < 1e-3:
        warnings.append("E_x is at its lower bound 0: these points do not show where the loss ends")
    elif share > TOP_SHARE - 1e-3:
        warnings.append("E_x is at its upper bound, the lowest loss seen")
    if e_y < 1e-3 * y.min():
        warnings.append("E_y is at its lower bound 0: these points do not show where the loss ends")
    e_x = float(share * x.min())
    z = (x - e_x) ** kappa
    # Directions of log K, kappa, E_x and E_y at the optimum, each of length one.
    jacobian = np.stack([z, z * np.log(x - e_x), -kappa * z / (x - e_x), np.ones_like(x)], axis=1)
    if np.linalg.cond(jacobian / np.linalg.norm(jacobian, axis=0)) > 1e3:
        warnings.append("K, kappa, E_x and E_y trade off against each other; only the fitted curve is meaningful")
    return e_x, e_y, warnings


def _offset_cost(x: np.ndarray, y: np.ndarray, shares: np.ndarray, kappas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(squared error, best E_y), both [shares, kappas]. E_x and kappa fixed, the rest is a line in (x - E_x)^kappa."""
    z = np.exp(kappas[None, :, None] * np.log(x[None, :] - shares[:, None] * x.min())[:, None, :])
    z_mean, y_mean = z.mean(-1), y.mean()
    slope = ((z - z_mean[..., None]) @ (y - y_mean)) / np.maximum(((z - z_mean[..., None]) ** 2).sum(-1), 1e-300)
    e_y = np.clip(y_mean - slope * z_mean, 0, 0.999 * y.min())
    slope = np.einsum("skn,skn->sk", z, y - e_y[..., None]) / np.einsum("skn,skn->sk", z, z)
    return ((y - e_y[..., None] - slope[..., None] * z) ** 2).sum(-1), e_y


def straight_line(x: np.ndarray, y: np.ndarray, fit: LossToLoss, *, fitted_offsets: bool) -> tuple[float, float, bool]:
    """y = a + b x beside the power law.

    Returns:
        (a, b, whether it fits as well): its small-sample AIC is at most 2 above the power law's. The power law counts K
        and kappa, and E_x and E_y too where they were fitted to these points.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    b, a = np.polyfit(x, y, 1)
    power = _aicc(y - fit.predict(x), 4 if fitted_offsets else 2)
    return float(a), float(b), _aicc(y - a - b * x, 2) <= power + AS_GOOD


def bootstrap_loss_to_loss(
    refit: Callable[[np.random.Generator | None], LossToLoss],
    *,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Interval]:
    """95% percentile intervals of K, kappa, E_x, E_y and R2.

    Args:
        refit: fits once to all points (None), or to points it resamples with the generator (see `drawn`). It should
            fit E again where E was fitted, so that the intervals carry its error.
        resamples: how many.
        seed: of the resampling.

    Raises:
        ValueError: more than half the resamples give no fit.
    """
    rng = np.random.default_rng(seed)
    whole = refit(None)
    fits = []
    for _ in range(resamples):
        try:
            fits.append(refit(rng))
        except ValueError:
            # A resample of few points can be all one point, or lie at its own E. Counted in `failed`.
            continue
    if len(fits) < resamples / 2:
        raise ValueError(f"{resamples - len(fits)} of {resamples} resamples gave no fit; {whole.n} points are too few")
    intervals = {}
    for name in ("K", "kappa", "e_x", "e_y", "r2"):
        low, high = np.percentile([getattr(fit, name) for fit in fits], [2.5, 97.5])
        intervals[name] = Interval(getattr(whole, name), float(low), float(high), resamples, resamples - len(fits))
    return intervals


def drawn(n: int, rng: np.random.Generator | None) -> np.ndarray:
    """[n] row numbers: all of them, or as many drawn with replacement."""
    return np.arange(n) if rng is None else rng.integers(0, n, n)


def one_line_or_two(
    first: tuple[np.ndarray, np.ndarray],
    second: tuple[np.ndarray, np.ndarray],
    e_x: float,
    e_y: float,
    *,
    resamples: int = 400,
    seed: int = 0,
) -> OneLine:
    """Test whether two groups of (x, y) share one line, with common E_x and E_y.

    An F test of four parameters against two in the logarithms, and the size of the difference in the unit of the loss
    with a bootstrap interval: with many points a gap too small to matter is still significant.

    Raises ValueError as fit_loss_to_loss.
    """
    fits = [fit_loss_to_loss(*group, e_x, e_y) for group in (first, second)]
    x, y = (np.concatenate([np.asarray(a, float), np.asarray(b, float)]) for a, b in zip(first, second, strict=True))
    together = fit_loss_to_loss(x, y, e_x, e_y)
    n = len(x)
    if n <= 4:
        raise ValueError(f"two lines need more than 4 points, got {n}")
    apart = sum(fit.n * fit.residual**2 for fit in fits)
    excess = together.n * together.residual**2 - apart
    statistic = (excess / 2) / (apart / (n - 4)) if apart > 0 else np.inf if excess > 1e-24 else 0.0
    p_value = float(f_distribution.sf(statistic, 2, n - 4))
    low, high = max(np.min(first[0]), np.min(second[0])), min(np.max(first[0]), np.max(second[0]))
    if low >= high:
        nothing = Interval(float("nan"), float("nan"), float("nan"), 0)
        return OneLine(p_value, nothing, (fits[0].n, fits[1].n), None)
    grid = np.linspace(low, high, 64)

    def gap(a: LossToLoss, b: LossToLoss) -> float:
        return float(np.mean(b.predict(grid) - a.predict(grid)))

    rng = np.random.default_rng(seed)
    gaps = []
    for _ in range(resamples):
        try:
            again = []
            for gx, gy in (first, second):
                rows = rng.integers(0, len(gx), len(gx))
                again.append(fit_loss_to_loss(np.asarray(gx)[rows], np.asarray(gy)[rows], e_x, e_y))
            gaps.append(gap(*again))
        except ValueError:
            # All of one group's rows alike: no line. Counted in `failed`.
            continue
    if len(gaps) < resamples / 2:
        raise ValueError(
            f"{resamples - len(gaps)} of {resamples} resamples gave no fit; the groups have too few points"
        )
    bounds = np.percentile(gaps, [2.5, 97.5])
    size = Interval(gap(*fits), float(bounds[0]), float(bounds[1]), resamples, resamples - len(gaps))
    return OneLine(p_value, size, (fits[0].n, fits[1].n), (float(low), float(high)))


def _aicc(residual: np.ndarray, parameters: int) -> float:
    n = len(residual)
    count = parameters + 1
    if n <= count + 1:
        return float("inf")
    mean_square = max(float(np.mean(residual**2)), 1e-300)
    return n * float(np.log(mean_square)) + 2 * count + 2 * count * (count + 1) / (n - count - 1)
