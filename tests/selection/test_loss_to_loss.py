"""Scaling laws and loss-to-loss lines: known laws come back, published tables are reproduced, bad fits say so."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from plumbline.selection.loss_to_loss import (
    bootstrap_loss_to_loss,
    drawn,
    fit_loss_to_loss,
    fit_offsets,
    fit_scaling_law,
    one_line_or_two,
    straight_line,
)
from plumbline.selection.scaling_law import _objective

DATA = Path(os.environ.get("PLUMBLINE_DATA") or Path(__file__).parents[2].parent / "shared" / "data") / "loss_to_loss"
published = pytest.mark.skipif(
    not (DATA / "kempner_sweep_small.csv").is_file(), reason="the published tables are not here"
)
# y set, n, kappa, K, E1, R2; x is fineweb-edu-100b.
TABLE = [
    ("fineweb-100b", 86, 1.000469, 1.014431, 0.999770),
    ("proof-pile-2", 83, 1.066258, 0.604887, 0.999040),
    ("slimpajama-chunk1", 85, 0.969777, 1.054002, 0.999654),
    ("smollm-corpus", 86, 1.006216, 1.070232, 0.999879),
]


def law_points(noise=0.0, seed=0, sizes=(2e7, 6e7, 2e8, 6e8, 2e9), tokens=(1e9, 3e9, 1e10, 3e10)):
    n, d = (grid.ravel() for grid in np.meshgrid(np.array(sizes), np.array(tokens)))
    loss = 1.9 + ((7e7 / n) ** (0.41 / 0.46) + 9e8 / d) ** 0.46
    return n, d, loss * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))


def test_a_known_law_comes_back():
    n, d, loss = law_points()
    law = fit_scaling_law(n, d, loss)
    np.testing.assert_allclose([law.E, law.A, law.B, law.alpha, law.beta], [1.9, 7e7, 9e8, 0.41, 0.46], rtol=1e-2)
    np.testing.assert_allclose(law.predict(n, d), loss, rtol=1e-5)
    assert law.r2 > 0.9999
    assert law.warnings == ()
    again = fit_scaling_law(n, d, loss, start=law)
    assert pytest.approx(law.E, rel=1e-3) == again.E


def test_gradient_is_the_gradient():
    n, d, loss = (np.log(v) for v in law_points(noise=0.01))
    theta = np.array([14.0, 16.0, 0.5, 0.4, 0.5])
    _, gradient = _objective(theta, n, d, loss)
    steps = np.eye(5) * 1e-6
    numeric = [(_objective(theta + h, n, d, loss)[0] - _objective(theta - h, n, d, loss)[0]) / 2e-6 for h in steps]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (law_points(sizes=(1e8,)), "share one size N"),
        (law_points(tokens=(1e10,)), "share one token count D"),
        (law_points(sizes=(1e8, 1e9), tokens=(1e9, 1e10)), "4 points cannot hold 5 parameters"),
        (tuple(v if i < 2 else v - 1.899999 for i, v in enumerate(law_points())), "lower bound 0"),
    ],
)
def test_ill_conditioned_laws_are_said(points, words):
    assert any(words in warning for warning in fit_scaling_law(*points).warnings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, d, y: (n, d, y[:-1]), "must pair up"),
        (lambda n, d, y: (n, d, -y), r"loss must be finite and positive; row 1"),
        (
            lambda n, d, y: (n, np.where(np.arange(len(d)) == 2, np.nan, d), y),
            "tokens must be finite and positive; row 3",
        ),
        (lambda n, d, y: (n[:1], d[:1], y[:1]), "needs points"),
        (lambda n, d, y: (n.reshape(4, 5), d, y), "one-dimensional"),
    ],
)
def test_bad_points_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        fit_scaling_law(*change(*law_points()))


def test_a_known_line_comes_back():
    x = np.linspace(2.2, 4, 30)
    fit = fit_loss_to_loss(x, 0.7 * (x - 1.5) ** 1.2 + 0.9, 1.5, 0.9)
    np.testing.assert_allclose([fit.K, fit.kappa, fit.r2], [0.7, 1.2, 1], rtol=1e-10)
    assert fit.n == 30
    assert fit.predict(3.0) == pytest.approx(0.7 * 1.5**1.2 + 0.9)
    with pytest.raises(ValueError, match="does not exceed E_x"):
        fit.predict(1.4)


@pytest.mark.parametrize(
    ("x", "y", "e", "words"),
    [
        ([2, 3], [2, 3], 0, "at least 3 points"),
        ([2, 3, 4], [2, 3], 0, "must pair up"),
        ([2, 3, 4], [2, 3, float("nan")], 0, "y must be finite and positive; row 3"),
        ([2, 3, 4], [2, 0, 3], 0, "y must be finite and positive; row 2"),
        ([2, 3, 4], [2, 3, 4], 2.5, r"e_x = 2.5 is not below every x: row 1 is 2"),
        ([2, 3, 4], [2, 3, 4], -1, "at least 0"),
        ([2, 2, 2], [2, 3, 4], 1, "every x is the same"),
    ],
)
def test_bad_pairs_are_refused(x, y, e, words):
    with pytest.raises(ValueError, match=words):
        fit_loss_to_loss(np.array(x, float), np.array(y, float), e, e)


def noisy(n, kappa=1.1, k=0.8, sigma=0.01, seed=0, low=2.3, high=4.0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(low, high, n)
    return x, k * (x - 2) ** kappa * np.exp(rng.normal(0, sigma, n)) + 1.5


def test_bootstrap_intervals_cover_the_truth():
    """95% intervals of kappa hold the truth in about 95% of worlds: 60 worlds, at least 50 of them."""
    covered = 0
    for seed in range(60):
        x, y = noisy(25, seed=seed)
        found = bootstrap_loss_to_loss(
            lambda rng, x=x, y=y: fit_loss_to_loss(x[r := drawn(25, rng)], y[r], 2, 1.5), resamples=100, seed=seed
        )
        covered += found["kappa"].low <= 1.1 <= found["kappa"].high
    assert covered >= 50
    assert found["kappa"].resamples == 100


def test_one_line_or_two():
    same = one_line_or_two(noisy(30, seed=1), noisy(40, seed=2), 2, 1.5)
    assert same.p_value > 0.01
    assert same.gap.low < 0 < same.gap.high
    assert same.n == (30, 40)
    other = one_line_or_two(noisy(30, seed=1), noisy(40, k=0.9, seed=2), 2, 1.5)
    assert other.p_value < 1e-6
    assert 0.05 < other.gap.low < other.gap.value < other.gap.high < 0.2
    apart = one_line_or_two(noisy(30, high=3), noisy(30, low=3.1, seed=3), 2, 1.5)
    assert apart.shared is None
    assert np.isnan(apart.gap.value)


def test_the_line_test_keeps_its_promise():
    """Groups of one line are called two in about 5% of worlds at p < 0.05: 200 worlds, 2 to 20 of them."""
    wrong = sum(
        one_line_or_two(noisy(12, seed=s), noisy(12, seed=1000 + s), 2, 1.5, resamples=2).p_value < 0.05
        for s in range(200)
    )
    assert 2 <= wrong <= 20


def test_offsets_without_sizes():
    x = np.linspace(2.1, 6, 60)
    e_x, e_y, _ = fit_offsets(x, 0.5 * (x - 2) ** 2 + 1)
    assert e_x == pytest.approx(2, rel=1e-3)
    assert e_y == pytest.approx(1, rel=1e-3)
    _, _, warnings = fit_offsets(x, 0.3 * x + 1)
    assert warnings
    assert fit_offsets(x[:5], x[:5])[2] == ["5 points cannot hold K, kappa, E_x and E_y; E is set to 0"]


def test_a_straight_line_that_fits_as_well_is_said():
    x, y = noisy(40, kappa=1.0)
    a, b, as_good = straight_line(x, y, fit_loss_to_loss(x, y, 2, 1.5), fitted_offsets=False)
    assert as_good
    assert b == pytest.approx(0.8, rel=0.05)
    assert a == pytest.approx(1.5 - 0.8 * 2, abs=0.1)
    x, y = noisy(40, kappa=2.0, sigma=0.001)
    assert not straight_line(x, y, fit_loss_to_loss(x, y, 2, 1.5), fitted_offsets=False)[2]


def read(name):
    with (DATA / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep(data):
    return [row for row in read("kempner_sweep_small.csv") if row["data"] == data]


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def pairs(data):
    y = {row["tokens"]: float(row["val_loss"]) for row in sweep(data)}
    x = {row["tokens"]: float(row["val_loss"]) for row in sweep("fineweb-edu-100b")}
    shared = [tokens for tokens in x if tokens in y]
    return np.array([x[t] for t in shared]), np.array([y[t] for t in shared])


def published_e(data):
    rows = read("kempner_opt_params_data.csv")
    (row,) = [r for r in rows if r["kaplan"] == "True" and r["data"] == data and r["loss_name"] == "val_loss"]
    return float(row["E"])


@published
@pytest.mark.parametrize(("data", "n", "kappa", "k", "r2"), TABLE)
def test_published_table_from_published_e(data, n, kappa, k, r2):
    fit = fit_loss_to_loss(*pairs(data), published_e("fineweb-edu-100b"), published_e(data))
    assert fit.n == n
    np.testing.assert_allclose([fit.kappa, fit.K, fit.r2], [kappa, k, r2], rtol=0, atol=1e-6)


@published
@pytest.mark.parametrize(("data", "n", "kappa", "k", "r2"), TABLE)
def test_published_table_with_e_from_scratch(data, n, kappa, k, r2):
    laws = []
    for name in ("fineweb-edu-100b", data):
        rows = sweep(name)
        laws.append(fit_scaling_law(column(rows, "params"), column(rows, "tokens"), column(rows, "val_loss")))
        assert pytest.approx(published_e(name), rel=0.01) == laws[-1].E
        assert laws[-1].warnings == ()
    fit = fit_loss_to_loss(*pairs(data), laws[0].E, laws[1].E)
    np.testing.assert_allclose([fit.kappa, fit.K, fit.r2], [kappa, k, r2], rtol=0.01)


@published
def test_the_held_out_run_is_predicted():
    big = {row["data"]: float(row["val_loss"]) for row in read("kempner_extrapolation.csv")}
    fit = fit_loss_to_loss(*pairs("fineweb-100b"), published_e("fineweb-edu-100b"), published_e("fineweb-100b"))
    assert fit.predict(big["fineweb-edu-100b"]) == pytest.approx(2.3315, abs=5e-5)
    assert big["fineweb-100b"] == pytest.approx(2.3282, abs=5e-5)
