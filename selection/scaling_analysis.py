"""From a table of losses to an answer: fits, tests between groups, what explains the difference, held-out runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import f as f_distribution

from plumbline.selection.loss_tables import Row, numbers, require
from plumbline.selection.loss_to_loss import (
    Interval,
    LossToLoss,
    OneLine,
    bootstrap_loss_to_loss,
    drawn,
    fit_loss_to_loss,
    fit_offsets,
    one_line_or_two,
    straight_line,
)
from plumbline.selection.scaling_law import ScalingLaw, fit_scaling_law

# Fewer points than this give a line, and no judgement of it.
FEWEST = 5


@dataclass
class Columns:
    """Which column holds what.

    Attributes:
        x, y: losses. With `reference` both are usually one column: the loss on the run's own validation set.
        group: what makes families (data, …); None is one family.
        params, tokens: sizes and token counts, for scaling laws; None where not known.
        reference: train-to-train: the group whose loss is x; every other group's loss is y.
        pair_on: train-to-train: columns that must agree for two runs to be a pair.
    """

    x: str
    y: str
    group: str | None = None
    params: str | None = None
    tokens: str | None = None
    reference: str | None = None
    pair_on: tuple[str, ...] = ()


@dataclass
class Family:
    """One group's line.

    Attributes:
        name: of the group.
        x, y: [n] pairs.
        fit, intervals: the line with 95% bootstrap intervals of K, kappa, e_x, e_y, r2.
        offsets: where E came from: `given`, `scaling laws`, `fitted to the pairs`.
        laws: (x side, y side), where scaling laws were fitted.
        straight: (a, b, whether y = a + b x fits as well).
        warnings: what makes it untrustworthy.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    fit: LossToLoss
    intervals: dict[str, Interval]
    offsets: str
    laws: tuple[ScalingLaw, ScalingLaw] | None
    straight: tuple[float, float, bool]
    warnings: list[str] = field(default_factory=list)


@dataclass
class Effect:
    """How much of what one common line leaves unexplained goes with a factor's levels (adjusted for their number).

    Attributes:
        factor, levels, n: the column, its levels, the rows that have it.
        share: 0 to 1, with its interval.
        p_value: of the F test of parallel lines a level against one line.
        determined_by: factors whose level fixes this one's in every row, so that the two cannot be told apart.
    """

    factor: str
    levels: int
    n: int
    share: Interval
    p_value: float
    determined_by: list[str] = field(default_factory=list)


def families(
    rows: Sequence[Row],
    columns: Columns,
    *,
    e_x: float | None = None,
    e_y: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[list[Family], list[str]]:
    """Fit every group.

    Args:
        rows: the table.
        columns: what holds what.
        e_x, e_y: irreducible losses, both or neither. Neither: from scaling laws if params and tokens are named, else
            fitted to the pairs.

    Returns:
        (families, names of groups left out with the reason).

    Raises:
        ValueError: bad columns or values, an unknown reference, or no group with enough points.
    """
    if (e_x is None) != (e_y is None):
        raise ValueError("give both e_x and e_y, or neither")
    # The whole table first: a bad value is one whichever group it falls into.
    for column in dict.fromkeys(name for name in (columns.x, columns.y, columns.params, columns.tokens) if name):
        numbers(rows, column)
    groups = _split(rows, columns)
    found, left_out = [], []
    for name, (own, other) in groups.items():
        x, y = _pairs(own, other, columns)
        if len(x) < FEWEST:
            left_out.append(f"{name}: {len(x)} pairs, fewer than {FEWEST}")
            continue
        try:
            found.append(_family(name, own, other, x, y, columns, e_x, e_y, resamples, seed))
        except ValueError as error:
            left_out.append(f"{name}: {error}")
    if not found:
        raise ValueError(f"no group can be fitted: {'; '.join(left_out[:4])}")
    return found, left_out


def compare(found: Sequence[Family], *, seed: int = 0) -> tuple[list[tuple[str, str, OneLine]], list[str]]:
    """One line or two, for every pair of families, on E common to both (the lower of the two on each side).

    Returns:
        (name, name, test) of each pair, and which pairs could not be tested with the reason.
    """
    results, left_out = [], []
    for place, a in enumerate(found):
        for b in found[place + 1 :]:
            e_x, e_y = min(a.fit.e_x, b.fit.e_x), min(a.fit.e_y, b.fit.e_y)
            try:
                results.append((a.name, b.name, one_line_or_two((a.x, a.y), (b.x, b.y), e_x, e_y, seed=seed)))
            except ValueError as error:
                left_out.append(f"{a.name} against {b.name}: {error}")
    return results, left_out


def factor_effects(
    rows: Sequence[Row], columns: Columns, factors: Sequence[str], *, resamples: int = 200, seed: int = 0
) -> list[Effect]:
    """What moves the line: data, tokenizer, architecture, size? Largest first.

    In the logarithms with E = 0, so that no family's offset decides for another. Rows without a factor's value are left
    out of that factor. Raises ValueError for a missing column.
    """
    u, v = np.log(numbers(rows, columns.x)), np.log(numbers(rows, columns.y))
    labels = {}
    for factor in factors:
        require(rows, factor)
        labels[factor] = np.array(["" if row.get(factor) is None else str(row[factor]) for row in rows])
    effects = []
    for factor in factors:
        known = labels[factor] != ""
        level = np.unique(labels[factor][known], return_inverse=True)[1]
        count, n = int(level.max()) + 1 if known.any() else 0, int(known.sum())
        if count < 2 or n < count + FEWEST:
            continue
        a, b = u[known], v[known]
        share, statistic = _explained(a, b, level)
        rng = np.random.default_rng(seed)
        shares = []
        for _ in range(resamples):
            pick = drawn(n, rng)
            shares.append(_explained(a[pick], b[pick], level[pick])[0])
        low, high = np.percentile(shares, [2.5, 97.5])
        interval = Interval(share, float(low), float(high), resamples)
        p_value = float(f_distribution.sf(statistic, count - 1, n - count - 1))
        fixed = [other for other in factors if other != factor and _determines(labels[other], labels[factor])]
        effects.append(Effect(factor, count, n, interval, p_value, fixed))
    return sorted(effects, key=lambda effect: -effect.share.value)


def held_out(found: Sequence[Family], rows: Sequence[Row], columns: Columns) -> list[tuple[str, float, float, float]]:
    """(family, x, predicted y, measured y) of runs that were not fitted.

    Raises ValueError for bad columns or values, or when no run belongs to a family.
    """
    results = []
    groups = _split(rows, columns)
    for family in found:
        if family.name in groups:
            own, other = groups[family.name]
            for x, y in zip(*_pairs(own, other, columns), strict=True):
                results.append((family.name, float(x), float(family.fit.predict(x)), float(y)))
    if not results:
        raise ValueError(f"no held-out run belongs to a fitted group; fitted are {', '.join(f.name for f in found)}")
    return results


def _split(rows: Sequence[Row], columns: Columns) -> dict[str, tuple[list[Row], list[Row]]]:
    """Group -> (rows of the x side, rows of the y side)."""
    if columns.group is None:
        if columns.reference is not None:
            raise ValueError("a reference needs a group column to find it in")
        return {"all": (list(rows), list(rows))}
    require(rows, columns.group)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(columns.group) or "unknown"), []).append(row)
    if columns.reference is None:
        return {name: (own, own) for name, own in groups.items()}
    if columns.reference not in groups:
        raise ValueError(f"no run has {columns.group} = {columns.reference!r}; there are {', '.join(groups)}")
    return {name: (groups[columns.reference], own) for name, own in groups.items() if name != columns.reference}


def _pairs(own: list[Row], other: list[Row], columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    if columns.reference is None:
        return numbers(own, columns.x), numbers(other, columns.y)
    if not columns.pair_on:
        raise ValueError("train-to-train needs columns to pair runs on, such as params and tokens")
    x, y = (_by_key(side, columns) for side in (own, other))
    shared = [key for key in x if key in y]
    if not shared:
        return np.zeros(0), np.zeros(0)
    return numbers([x[key] for key in shared], columns.x), numbers([y[key] for key in shared], columns.y)


def _by_key(side: list[Row], columns: Columns) -> dict[tuple[Any, ...], Row]:
    """Runs by what they are paired on; numbers pair by value, however a table spells them."""
    for name in columns.pair_on:
        require(side, name)
    found: dict[tuple[Any, ...], Row] = {}
    for row in side:
        key = tuple(_value(row.get(name)) for name in columns.pair_on)
        if key in found:
            group = row.get(columns.group) if columns.group else "all"
            raise ValueError(
                f"two runs of {group} agree on {', '.join(columns.pair_on)} ({', '.join(map(str, key))}): name more "
                "columns that tell them apart to pair on"
            )
        found[key] = row
    return found


def _value(raw: Any) -> Any:
    try:
        return float(raw)
    except (TypeError, ValueError):
        return str(raw)


def _family(
    name: str,
    own: list[Row],
    other: list[Row],
    x: np.ndarray,
    y: np.ndarray,
    columns: Columns,
    e_x: float | None,
    e_y: float | None,
    resamples: int,
    seed: int,
) -> Family:
    warnings: list[str] = []
    laws: tuple[ScalingLaw, ScalingLaw] | None = None
    if e_x is not None and e_y is not None:
        offsets, fixed_x, fixed_y = "given", e_x, e_y

        def refit(rng: np.random.Generator | None) -> LossToLoss:
            rows = drawn(len(x), rng)
            return fit_loss_to_loss(x[rows], y[rows], fixed_x, fixed_y)

    elif columns.params is not None and columns.tokens is not None:
        offsets = "scaling laws"
        sides = [
            tuple(numbers(side, column) for column in (columns.params, columns.tokens, loss))
            for side, loss in ((own, columns.x), (other, columns.y))
        ]
        whole = tuple(fit_scaling_law(*side) for side in sides)
        laws = whole[0], whole[1]
        for axis, law in zip("xy", whole, strict=True):
            warnings += [f"scaling law of {axis}: {warning}" for warning in law.warnings]

        def refit(rng: np.random.Generator | None) -> LossToLoss:
            rows = drawn(len(x), rng)
            e = [law.E for law in whole]
            if rng is not None:
                for place, side in enumerate(sides):
                    again = drawn(len(side[0]), rng)
                    e[place] = fit_scaling_law(*(values[again] for values in side), start=whole[place]).E
            return fit_loss_to_loss(x[rows], y[rows], *e)

    else:
        offsets = "fitted to the pairs"
        warnings += fit_offsets(x, y)[2]

        def refit(rng: np.random.Generator | None) -> LossToLoss:
            rows = drawn(len(x), rng)
            return fit_loss_to_loss(x[rows], y[rows], *fit_offsets(x[rows], y[rows])[:2])

    fit = refit(None)
    if laws is None and offsets != "given":
        # A fit of four parameters takes long; its interval needs fewer resamples than digits.
        resamples = min(resamples, 100)
    intervals = bootstrap_loss_to_loss(refit, resamples=resamples, seed=seed)
    straight = straight_line(x, y, fit, fitted_offsets=offsets == "fitted to the pairs")
    return Family(name, x, y, fit, intervals, offsets, laws, straight, warnings)


def _explained(u: np.ndarray, v: np.ndarray, level: np.ndarray) -> tuple[float, float]:
    """(adjusted share of one line's residual variance that parallel lines a level explain, the F statistic)."""
    present, level = np.unique(level, return_inverse=True)
    n, count = len(u), len(present)
    common = np.column_stack([np.ones(n), u])
    apart = np.column_stack([np.eye(count)[level], u])
    one, many = (float(((v - m @ np.linalg.lstsq(m, v, rcond=None)[0]) ** 2).sum()) for m in (common, apart))
    if count < 2 or n <= count + 1 or one <= 0:
        return 0.0, 0.0
    left = many / (n - count - 1)
    share = 1 - left / (one / (n - 2))
    return max(share, 0.0), ((one - many) / (count - 1)) / left if left > 0 else float("inf")


def _determines(cause: np.ndarray, effect: np.ndarray) -> bool:
    known = (cause != "") & (effect != "")
    levels = np.unique(cause[known])
    return len(levels) > 1 and all(len(np.unique(effect[known & (cause == level)])) == 1 for level in levels)
