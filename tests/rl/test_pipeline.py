"""Select, train, evaluate on a tiny policy: what a run leaves behind, and that a resumed one repeats nothing."""

import json
import shutil

import pytest
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.config import parse_config
from plumbline.rl.pipeline import accuracy_table, run_pipeline
from plumbline.rl.selecting import arms


def config(policy_path, output, **selection):
    return parse_config(
        {
            "name": "tiny",
            "output": str(output),
            "seed": 3,
            "steps": 2,
            "policy": {"path": policy_path, "device": "cpu"},
            "data": {"source": "procedural:train", "limit": 8},
            "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 12},
            "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 64, "threads": 1, "warmup_steps": 1},
            "reward": {"shaping": "plumbline.testing:short_is_good"},
            "checkpoint": {"every_steps": 0, "keep": 1},
            "evaluation": {"source": "procedural:heldout", "limit": 10},
            # The random policy is never right; its shaped reward (-1 to 0) is what has curves here, and they lie close together.
            "selection": {"prerun_steps": 4, "variant": "paper", "threshold": 0.9955} | selection,
            "ray": {"dashboard": False},
        }
    )


@pytest.fixture(scope="module")
def finished(policy_path, tmp_path_factory):
    cfg = config(policy_path, tmp_path_factory.mktemp("pipeline") / "run")
    cfg.folder.mkdir()
    return cfg, run_pipeline(cfg, Console(quiet=True))


def test_a_run_leaves_everything_behind(finished):
    cfg, result = finished
    summary = json.loads((cfg.folder / "summary.json").read_text())
    for name in ("base", *arms(cfg)):
        accuracy = summary[f"{name}_accuracy"]
        assert set(accuracy) == {"mean", "low", "high", "n"}
        assert accuracy["n"] == 10
        assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
        answers = (cfg.folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()
        assert len(answers) == 10
    assert summary["rollouts"] == {"prerun": 48, **dict.fromkeys(arms(cfg), 24)}
    assert summary["samples"]["full"] == 8
    assert 0 < summary["samples"]["lim"] == summary["samples"]["random"] < 8
    assert summary["seconds"] > 0
    assert summary["peak_rss_mb"] > 100
    kept = (cfg.folder / "selection" / "lim_ids.txt").read_text().split()
    scores = json.loads((cfg.folder / "selection" / "scores.json").read_text())["scores"]
    assert kept == [sample_id for sample_id, score in scores.items() if score is not None and score >= 0.9955]
    assert "<html" in (cfg.folder / "report.html").read_text()
    assert accuracy_table(result).row_count == 4


def test_a_resumed_run_repeats_nothing_that_was_finished(finished, tmp_path):
    cfg, result = finished
    shutil.copytree(cfg.folder, tmp_path / "run")
    again = cfg.model_copy(update={"output": str(tmp_path / "run")})
    # Interrupted in the last arm: its training and evaluation are missing, the others stand.
    shutil.rmtree(again.folder / "lim")
    for file in (again.folder / "evaluation").glob("lim*"):
        file.unlink()
    (again.folder / "summary.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in again.folder.rglob("metrics.jsonl")}
    answers = {path: path.stat().st_mtime_ns for path in (again.folder / "evaluation").glob("*.jsonl")}
    resumed = run_pipeline(again, Console(quiet=True), resume=True)
    assert len(stamps) == 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in (stamps | answers).items())
    before, after = result.summary(), resumed.summary()
    for name in ("base", *arms(cfg)):
        assert after[f"{name}_accuracy"] == before[f"{name}_accuracy"]
    assert after["rollouts"] == before["rollouts"]
    assert resumed.arms["lim"].per_problem == result.arms["lim"].per_problem
    first, second = (folder / "evaluation" / "lim.jsonl" for folder in (cfg.folder, again.folder))
    assert sorted(first.read_text().splitlines()) == sorted(second.read_text().splitlines())


def test_a_threshold_that_keeps_nothing_is_refused(finished, tmp_path):
    cfg, _ = finished
    shutil.copytree(cfg.folder, tmp_path / "run")
    again = cfg.model_copy(
        update={
            "output": str(tmp_path / "run"),
            "selection": cfg.selection.model_copy(update={"threshold": 1.01}),
        }
    )
    with pytest.raises(InputError, match="selects nothing: no score of 8 samples fits"):
        run_pipeline(again, Console(quiet=True), resume=True)


def without_the_selected_arms(folder):
    """A finished pipeline as it was before it selected."""
    for arm in ("random", "lim"):
        shutil.rmtree(folder / arm)
        for file in (folder / "evaluation").glob(f"{arm}*"):
            file.unlink()


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ({"method": "p(1-p)", "share": 0.5}, ["full", "random", "p1-p"]),
        ({"method": "random", "count": 3}, ["full", "random"]),
    ],
)
def test_any_method_can_select(finished, tmp_path, selection, names, capsys):
    cfg, _ = finished
    shutil.copytree(cfg.folder, tmp_path / "run")
    without_the_selected_arms(tmp_path / "run")
    again = config(cfg.policy.path, tmp_path / "run", **{"threshold": None, "variant": "limr"} | selection)
    result = run_pipeline(again, Console(width=400), resume=True)
    summary = json.loads((again.folder / "summary.json").read_text())
    assert list(result.arms) == names
    assert [name for name in summary if name.endswith("_accuracy")] == [
        "base_accuracy",
        *(f"{n}_accuracy" for n in names),
    ]
    kept = (again.folder / "selection" / f"{names[-1]}_ids.txt").read_text().split()
    assert summary["samples"] == {"full": 8, "random": len(kept), names[-1]: len(kept)}
    assert f"{selection['method']} keeps {len(kept)} of 8 samples: " in capsys.readouterr().out
    assert "Grader health" in (again.folder / "selection" / "report.html").read_text()


def test_what_not_to_trust_is_said(finished, tmp_path, capsys):
    """A run that is never right has an average of 0, and LIM keeps what was never right."""
    cfg, _ = finished
    shutil.copytree(cfg.folder, tmp_path / "run")
    without_the_selected_arms(tmp_path / "run")
    again = config(cfg.policy.path, tmp_path / "run", variant="limr", threshold=None)
    result = run_pipeline(again, Console(width=400), resume=True)
    assert "never answered right" in capsys.readouterr().out
    assert "never answered right" in result.summary()["selection"]["warnings"][0]


def test_a_prerun_that_does_not_see_everything_is_refused(policy_path, tmp_path):
    with pytest.raises(InputError, match="raise it to at least 2"):
        run_pipeline(config(policy_path, tmp_path, prerun_steps=1), Console(quiet=True))
