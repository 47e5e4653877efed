"""Trackers by name: refused when they are not there, and the real ones, where installed, get what was logged."""

import json

import pytest
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl import trackers
from plumbline.rl.config import parse_config
from plumbline.rl.telemetry import Telemetry, read_metrics

ROW = {
    "reward/mean": 0.5,
    "reward/correct": 0.25,
    "rollout/tokens_per_second": 10.0,
    "time/step_seconds": 2.0,
    "learner/gradient_norm": float("inf"),
}


def config(folder, *names):
    tree = {"name": "tracked", "output": str(folder), "steps": 4, "tracking": {"trackers": list(names), "project": "p"}}
    return parse_config(tree)


def log(folder, names, steps, start=0):
    with Telemetry(config(folder, *names), start, Console(quiet=True)) as telemetry:
        for step in steps:
            telemetry.log(step, ROW | {"reward/mean": step / 10})


def test_an_unknown_tracker_is_refused():
    with pytest.raises(InputError, match="unknown tracker 'comet' in"):
        trackers.check_trackers(["comet"])


@pytest.mark.parametrize("name", list(trackers.PACKAGES))
def test_a_tracker_that_is_not_installed_is_refused(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"names {name}, which is not installed: pip install"):
        trackers.check_trackers([name])


def test_tensorboard_and_jsonl_are_always_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(tmp_path, [], [1, 2])
    log(tmp_path, [], [2, 3], start=1)
    assert [row["reward/mean"] for row in read_metrics(tmp_path)] == [0.1, 0.2, 0.3]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, round(e.value, 3)) for e in board.Scalars("reward/mean")] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert not (tmp_path / trackers.RECORD).exists()


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    log(tmp_path, ["mlflow"], [1, 2])
    log(tmp_path, ["mlflow"], [3], start=2)
    known = json.loads((tmp_path / trackers.RECORD).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params["tracking.project"] == "p"
    history = client.get_metric_history(known, "reward/mean")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert "learner/gradient_norm" not in run.data.metrics


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(tmp_path, ["wandb"], [1, 2])
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert json.loads((tmp_path / trackers.RECORD).read_text())["wandb"]


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    log(tmp_path, ["trackio"], [1, 2])
    assert list((tmp_path / "trackio").glob("p*"))
    assert json.loads((tmp_path / trackers.RECORD).read_text())["trackio"] == "tracked"
