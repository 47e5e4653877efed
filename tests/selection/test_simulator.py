"""The simulator of learners in benchmarks/selection.py says what its world is made to say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from plumbline.selection.selection_report import never_right_is_kept


@pytest.fixture(scope="module")
def simulator():
    path = Path(__file__).parents[2] / "benchmarks" / "selection.py"
    spec = importlib.util.spec_from_file_location("selection_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_arms_are_compared_with_seeds_and_costs(simulator):
    world = simulator.World(samples=120, held_out=300, budget=10_000, prerun_epochs=3)
    results = simulator.compare(world, 2)
    assert {len(values) for entry in results.values() for values in entry.values()} == {2}
    assert results == simulator.compare(world, 2)
    assert np.mean(results["full"]["equal"]) > np.mean(results["base (untrained)"]["equal"]) + 0.02
    assert results["random"]["size"] == results["lim"]["size"]
    assert results["full"]["equal"] == results["full"]["total"]
    assert np.mean(results["lim"]["total"]) < np.mean(results["lim"]["equal"])
    assert "| full |" in simulator.table(results)


@pytest.mark.parametrize(("rate", "avoided"), [(0.05, True), (0.006, False)])
def test_lim_avoids_bad_golds_only_once_the_average_is_high(simulator, rate, avoided):
    """A curve of zeros is far from a high average and close to a low one, and the report says when it is kept."""
    world = simulator.World(samples=300, rate=rate)
    ids, curves, cost = simulator.record(world, 0, 6)
    assert cost == 300 * 6 * world.completions
    assert not np.isnan(curves).any()
    bad = simulator.Learner(world, 0).bad[:300]
    chosen = simulator.select_samples("lim", ids, curves)
    assert bad.sum() > 15
    assert (bad[chosen.kept].mean() < 0.5 * bad.mean()) == avoided
    assert (never_right_is_kept(chosen) == "") == avoided
