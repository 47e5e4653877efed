"""The page of a run and of several: what is in it comes from the folders, and every picture has labelled axes."""

import json
import re

import pytest
import yaml

from plumbline.errors import InputError
from plumbline.rl import run_report
from plumbline.rl.config import parse_config
from plumbline.rl.evaluation.scores import summarise


def make_run(folder, *, rate=1e-6, shift=0.0, right=(True, False, True)):
    """A folder as train and evaluate leave it."""
    folder.mkdir(parents=True)
    config = parse_config({"name": folder.name, "output": str(folder), "learner": {"learning_rate": rate}})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    marker = {"kind": "train", "name": folder.name, "started": "2026-01-01T00:00:00", "versions": {"torch": "2.11"}}
    (folder / "run.json").write_text(json.dumps(marker))
    rows = [
        {"step": n, "reward/mean": n / 10 + shift, "grader/error": 0.0, "learner/entropy": 1.0} for n in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        {"sample_id": f"s{n // 2}", "rollout": n % 2, "problem": "?", "response": "", "gold": "1", "answer": "1"}
        | {"correct": correct, "reason": "correct" if correct else "wrong", "vote": 0, "tokens": 10 + n}
        | {"truncated": False, "level": str(n // 2)}
        for n, correct in enumerate(value for value in right for _ in range(2))
    ]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "own.json").write_text(json.dumps(summarise("own", answers, 2.0).as_dict()))
    return folder


def page(folders, path):
    run_report.write_run_report(folders, path)
    return path.read_text(encoding="utf-8")


def test_one_run(tmp_path):
    text = page([make_run(tmp_path / "a")], tmp_path / "a" / "run.html")
    assert "<h1>plumbline train: a</h1>" in text
    for title in ("Run", "Evaluation", "Levels", "Completion lengths", "Reward", "Policy", "Grader", "Settings"):
        assert f"<h2>{title}</h2>" in text
    assert "66.7%" in text
    assert "learner.learning_rate" in text
    assert "Gradings that failed (share): 0 in every step." in text
    alts = re.findall(r'<img alt="([^"]*)"', text)
    assert len(alts) == 4
    assert all(" against " in alt for alt in alts)
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_two_runs_share_every_figure(tmp_path):
    a = make_run(tmp_path / "x" / "run")
    b = make_run(tmp_path / "y" / "run", rate=2e-6, shift=1.0, right=(True, True, True))
    text = page([a, b], tmp_path / "both.html")
    assert "<h1>plumbline: x/run, y/run</h1>" in text
    assert "<h2>Settings that differ</h2>" in text
    settings = text.partition("Settings that differ")[2]
    assert "learner.learning_rate" in settings
    assert "rollout.slots" not in settings
    assert "<h2>Paired differences</h2>" in text
    assert "<h2>Changed problems: own</h2>" in text
    assert "1 of 1 problems that changed" in text
    assert re.search(r"s1</t[dh]><td[^>]*>0%</td><td[^>]*>100%</td>", text)
    assert "+33.3" in text
    figure = run_report.curve_figure({"x": [{"step": 1, "k": 1.0}], "y": [{"step": 1, "k": 2.0}]}, "k", "value (unit)")
    assert [line.get_label() for line in figure.axes[0].lines] == ["x", "y"]
    assert figure.axes[0].get_xlabel() == "training step"
    assert figure.axes[0].get_ylabel() == "value (unit)"


def test_a_pipeline_shows_its_stages(tmp_path):
    make_run(tmp_path / "p")
    make_run(tmp_path / "p" / "lim")
    run = run_report.read_run(tmp_path / "p", "p")
    assert list(run.curves) == ["p", "p: lim"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="not the folder of a run"):
        run_report.write_run_report([tmp_path], tmp_path / "x.html")
    a = make_run(tmp_path / "a")
    with pytest.raises(InputError, match="the same run twice"):
        run_report.write_run_report([a, a], tmp_path / "x.html")
