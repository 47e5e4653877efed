"""Bad input ends with exit code 2 and one clear line, before anything is started."""

import json
import os
import sys

import pytest

from plumbline.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the command line; returns (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLUMBLINE_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "run.yaml").write_text("name: x\ndata: {source: 'procedural:train', limit: 4}\n", encoding="utf-8")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["plumbline", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.yaml"], "none.yaml does not exist"),
        (["train", "run.yaml", "rollout.promts_per_step=3"], "nearest valid key is 'rollout.prompts_per_step'"),
        (["run", "run.yaml", "policy.path=no-such-model"], "unknown model 'no-such-model'"),
        (["train", "run.yaml", "data.source=none.jsonl"], "none.jsonl does not exist"),
        (["train", "run.yaml", "data.subset=none.txt"], "data.subset none.txt cannot be read"),
        (["train", "run.yaml", "reward.shaping=nothing"], "unknown reward.shaping 'nothing'"),
        (["train", "run.yaml", "--resume"], "nothing to resume"),
        (["train", "run.yaml", "output=run.yaml/below"], "cannot be written"),
        (["run", "run.yaml"], "evaluation.source is not set"),
        (["evaluate", "embedded", "--benchmarks", "aime1999"], "unknown benchmark or data source 'aime1999'"),
        (["evaluate", "no-such-model"], "unknown model 'no-such-model'"),
        (["evaluate", "embedded", "--loss-on", "none.txt"], "text set none.txt does not exist"),
        (["evaluate", "no-such-model", "--loss-on", "run.yaml"], "unknown file type '.yaml'"),
        (["evaluate", "embedded", "--preset", "avg64"], "unknown preset 'avg64'; use limr, avg32, greedy"),
        (["evaluate", "embedded", "--engine", "tgi"], "unknown engine 'tgi'; use native, vllm, endpoint"),
        (["evaluate", "embedded", "--engine", "endpoint"], "--url http://HOST:PORT/v1 belong together"),
        (
            ["evaluate", "m", "--engine=endpoint", "--url=http://127.0.0.1:9/v1", "--benchmarks=procedural:heldout"],
            "no server to evaluate",
        ),
        (["evaluate", "--manifest", "none.json"], "manifest none.json cannot be read"),
        (["evaluate", "embedded", "--benchmarks", ","], "--benchmarks names nothing"),
        (["compare", "a", "b"], "a is not the folder of an evaluation"),
        (["report", "nowhere"], "nowhere is not the folder of a run"),
        (["train", "run.yaml", "tracking.trackers=[comet]"], "unknown tracker 'comet'"),
        (["train", "run.yaml", "learner.optimizer=adamw_8bit", "learner.workers=2"], "needs learner.workers 1, not 2"),
        (["select", "lim", "--history", "nowhere"], "nowhere"),
        (["check", "nowhere"], "nowhere"),
    ],
)
def test_one_clear_line(run, arguments, words):
    code, error = run(*arguments)
    lines = [line for line in error.splitlines() if line.startswith("plumbline: ")]
    assert code == 2, error
    assert len(lines) == 1
    assert words in lines[0]


def test_an_optimizer_whose_package_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    code, error = run("train", "run.yaml", "learner.optimizer=adamw_8bit")
    assert code == 2
    assert "needs bitsandbytes: pip install 'plumbline-rl[adamw-8bit]'" in error


def test_a_subset_that_selects_nothing(run, tmp_path):
    (tmp_path / "ids.txt").write_text("nobody\n", encoding="utf-8")
    code, error = run("train", "run.yaml", "data.subset=ids.txt")
    assert code == 2
    assert "selects none of the 4 problems" in error


def test_an_earlier_run_is_never_overwritten_unasked(run, tmp_path):
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    code, error = run("train", "run.yaml", "--overwrite")
    assert code == 2
    assert "not a run of plumbline" in error
    assert (folder / "notes.txt").exists()
    (folder / "run.json").write_text(json.dumps({}), encoding="utf-8")
    code, error = run("train", "run.yaml")
    assert code == 2
    assert "--resume, --overwrite" in error


def test_a_full_disk_is_seen_before_work_starts(run, monkeypatch):
    import shutil

    usage = shutil.disk_usage(os.getcwd())
    monkeypatch.setattr("plumbline.rl.output.shutil.disk_usage", lambda _: usage._replace(free=1000))
    code, error = run("train", "run.yaml")
    assert code == 2
    assert "free some room" in error


def test_version(run):
    assert run("--version")[0] == 0
