"""Loss as a function of size and data, fitted as in arXiv 2411.12925:

    L(N, D) = E + ((A / N)^(alpha / beta) + B / D)^beta

N parameters, D training tokens, E the loss that neither removes. The fit minimises the Huber loss (1e-3) of log L with
L-BFGS from 16 starts and keeps the best.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

HUBER = 1e-3
STARTS = [(a, b, 0.5, 0.4, 0.4) for a in (5.0, 10.0, 15.0, 20.0) for b in (5.0, 10.0, 15.0, 20.0)]
PARAMETERS = 5
# Scaled Jacobians beyond this leave at least one direction of the parameters to chance.
ILL_CONDITIONED = 1e4


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        E, A, B, alpha, beta: as in the formula; E in the unit of the losses, A in parameters, B in tokens.
        huber: sum of the Huber losses of log L at the optimum.
        r2: share of the variance of L explained.
        n: points.
        warnings: what makes the fit untrustworthy, in words; empty if nothing does.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    huber: float
    r2: float
    n: int
    warnings: tuple[str, ...] = field(default=())

    def predict(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Loss at N parameters and D tokens."""
        part = (self.A / np.asarray(params, dtype=float)) ** (self.alpha / self.beta) + self.B / np.asarray(
            tokens, dtype=float
        )
        return self.E + part**self.beta

    def _vector(self) -> np.ndarray:
        return np.array([np.log(self.A), np.log(self.B), np.log(self.E), self.alpha, self.beta])


def fit_scaling_law(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    *,
    start: ScalingLaw | None = None,
) -> ScalingLaw:
    """Fit E, A, B, alpha, beta.

    Args:
        params: [n] parameters N.
        tokens: [n] training tokens D.
        loss: [n] losses.
        start: begin at this law alone (resamples of data already fitted) and not at the 16 starts.

    Returns:
        ScalingLaw, its `warnings` saying what is ill-conditioned.

    Raises:
        ValueError: lengths differ, fewer than two points, or values that are not finite and positive.
    """
    n_, d_, l_ = checked("params", params), checked("tokens", tokens), checked("loss", loss)
    if not len(n_) == len(d_) == len(l_):
        raise ValueError(f"params, tokens and loss have {len(n_)}, {len(d_)} and {len(l_)} values; they must pair up")
    if len(l_) < 2:
        raise ValueError(f"a scaling law needs points, got {len(l_)}")
    logs = np.log(n_), np.log(d_), np.log(l_)
    best = None
    # Resamples are many and need no more digits than their spread.
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-12} if start is None else {"ftol": 1e-11, "gtol": 1e-9}
    for initial in STARTS if start is None else [start._vector()]:
        found = minimize(_objective, initial, args=logs, jac=True, method="L-BFGS-B", options=options)
        if np.isfinite(found.fun) and (best is None or found.fun < best.fun):
            best = found
    if best is None:
        raise ValueError("the scaling law fit diverged from every start; check the units of params, tokens and loss")
    a, b, e, alpha, beta = best.x
    with np.errstate(over="ignore"):
        law = ScalingLaw(
            float(np.exp(e)),
            float(np.exp(a)),
            float(np.exp(b)),
            float(alpha),
            float(beta),
            float(best.fun),
            0.0,
            len(l_),
        )
    residual = l_ - np.exp(_log_loss(best.x, *logs[:2])[0])
    spread = ((l_ - l_.mean()) ** 2).sum()
    r2 = 1 - float((residual**2).sum() / spread) if spread > 0 else float("nan")
    warnings = _complaints(law, best.x, n_, d_, l_)
    return ScalingLaw(law.E, law.A, law.B, law.alpha, law.beta, law.huber, r2, law.n, tuple(warnings))


def checked(name: str, values: np.ndarray) -> np.ndarray:
    """[n] float64. Raises ValueError, naming the first bad row (from 1), if a value is not finite and positive."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if len(bad):
        raise ValueError(
            f"{name} must be finite and positive; row {bad[0] + 1} is {array[bad[0]]:g} ({len(bad)} such rows)"
        )
    return array


def _log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log of the predicted loss [n], its Jacobian [n, 5]) for logarithms of N and D."""
    a, b, e, alpha, beta = theta
    from_size = alpha / beta * (a - n)
    total = np.logaddexp(from_size, b - d)
    value = np.logaddexp(e, beta * total)
    reducible = np.exp(beta * total - value)
    size_share = np.exp(from_size - total)
    by_size = reducible * beta * size_share
    jacobian = np.stack(
        [
            by_size * alpha / beta,
            reducible * beta * (1 - size_share),
            1 - reducible,
            by_size * (a - n) / beta,
            reducible * total - by_size * (a - n) * alpha / beta**2,
        ],
        axis=1,
    )
    return value, jacobian


def _objective(theta: np.ndarray, n: np.ndarray, d: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    with np.errstate(all="ignore"):
        value, jacobian = _log_loss(theta, n, d)
        residual = value - target
        size = np.abs(residual)
        loss = np.where(size <= HUBER, 0.5 * residual**2, HUBER * (size - 0.5 * HUBER)).sum()
        gradient = np.clip(residual, -HUBER, HUBER) @ jacobian
    if not np.isfinite(loss) or not np.isfinite(gradient).all():
        return np.inf, np.zeros_like(theta)
    return float(loss), gradient


def _complaints(law: ScalingLaw, theta: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> list[str]:
    found = []
    if len(loss) <= PARAMETERS:
        found.append(
            f"{len(loss)} points cannot hold {PARAMETERS} parameters; at least {PARAMETERS + 1}, better 20, are needed"
        )
    for name, values in (("size N", n), ("token count D", d)):
        if np.ptp(values) <= 1e-6 * values.max():
            found.append(f"all {len(loss)} points share one {name}, so its exponent and coefficient are not determined")
    if 1e-3 * loss.min() > law.E:
        found.append("E is at its lower bound 0: the points do not show where the loss ends")
    if 0.995 * loss.min() < law.E:
        found.append(f"E = {law.E:.4g} reaches the lowest loss seen ({loss.min():.4g}): nothing is left to explain")
    if law.alpha <= 0 or law.beta <= 0:
        found.append(
            f"alpha = {law.alpha:.3g}, beta = {law.beta:.3g}: an exponent is not positive, so more would not help"
        )
    _, jacobian = _log_loss(theta, np.log(n), np.log(d))
    lengths = np.linalg.norm(jacobian, axis=0)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        found.append("a parameter has no influence on any point")
    elif (condition := np.linalg.cond(jacobian / lengths)) > ILL_CONDITIONED:
        found.append(
            f"parameters trade off against each other (condition number {condition:.1g}); "
            "only the fitted curve is meaningful"
        )
    return found
