"""benchmarks/selection_runs.py on a tiny policy: every arm at both ways of counting, and stopping loses nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from plumbline.errors import InputError


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "selection_runs.py"
    spec = importlib.util.spec_from_file_location("selection_runs_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(policy_path, tmp_path):
    tree = {
        "name": "tiny",
        "steps": 2,
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 8},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 12},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 64, "threads": 1},
        "reward": {"shaping": "plumbline.testing:short_is_good"},
        "checkpoint": {"every_steps": 0, "keep": 1},
        "evaluation": {"source": "procedural:heldout", "limit": 6},
        "selection": {"prerun_steps": 4, "variant": "paper", "share": 0.5},
        "ray": {"dashboard": False},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_arms_seeds_and_going_on(benchmark, config, tmp_path, capsys):
    folder, methods = tmp_path / "runs", "full,random,pass_rate,variance,lim"
    command = [str(config), "--methods", methods, "--folder", str(folder)]
    benchmark.main([*command, "--seeds", "1"])
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    # 8 problems, 4 a step: an epoch is 2 steps. The random policy is never right, so nothing falls into the band.
    spent = {(row["arm"], row["steps"]): row["spent"] for row in rows}
    expected = [
        ("base", 0),
        ("full", 2),
        ("full", 4),
        ("full", 6),
        ("random", 2),
        ("random", 6),
        ("variance", 2),
        ("lim", 2),
    ]
    assert spent == {(arm, steps): steps * 12 for arm, steps in expected}
    assert {row["arm"]: row["samples"] for row in rows} == {"base": 8, "full": 8, "random": 4, "variance": 4, "lim": 4}
    out = capsys.readouterr().out
    assert "pass_rate is left out: selection: pass_rate selects nothing" in out
    assert "| pass_rate | 0 |" in out
    # Killed in the second seed while a row was written: what is whole stands, and nothing of the first runs again.
    before = (folder / "results.jsonl").read_text()
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"seed": 1, "arm": "ba')
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "seed-0").rglob("*.json*")}
    benchmark.main([*command, "--seeds", "2", "--output", str(tmp_path / "table.md")])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert (folder / "results.jsonl").read_text().startswith(before)
    text = (tmp_path / "table.md").read_text()
    assert "| full | 2 | 8 | 2 | 0.0 [0.0, 0.0] | - | 6 | 0.0 [0.0, 0.0] | - |" in text
    assert "| lim | 2 | 4 | 2 | 0.0 [0.0, 0.0] | +0.0 [+0.0, +0.0] | 2 |" in text
    assert text.count("Left out: seed") == 2
    with pytest.raises(SystemExit):
        benchmark.main([*command, "seed=7"])
    assert "results of another config" in capsys.readouterr().err


def test_intervals_are_students(benchmark):
    # Mean 3, standard deviation 1.5811, t(0.975, 4) = 2.7764: half width 1.9632.
    assert benchmark.interval([1, 2, 3, 4, 5], ".4f") == "3.0000 [1.0368, 4.9632]"
    assert benchmark.interval([2.0], ".1f") == "2.0"


def test_what_would_not_compare_is_refused(benchmark, config, tmp_path, capsys):
    for words, override in (
        ("schedule=constant", "learner.schedule=cosine"),
        ("uniform", "selection.sampler.name=greso"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main([str(config), override, "--folder", str(tmp_path / "x")])
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main([str(config), "--methods", "full,limm", "--folder", str(tmp_path / "x")])
    assert "did you mean 'lim'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    results = benchmark.Results(tmp_path / "x", "a")
    results.add(benchmark.Row(0, "full", 2, 8, 24, 0.5, 6))
    assert list(benchmark.Results(tmp_path / "x", "a").rows) == [(0, "full", 2)]
    with pytest.raises(InputError, match="another config"):
        benchmark.Results(tmp_path / "x", "b")
