"""Experiment trackers by name: Weights & Biases, trackio and MLflow, each only if it is asked for and installed.

TensorBoard and metrics.jsonl are always written (telemetry.py); these come on top.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from plumbline.errors import InputError
from plumbline.rl.files import write_whole

PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
RECORD = "trackers.json"
MLFLOW_BATCH = 100


class Tracker(Protocol):
    """One run of an experiment tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(names: list[str]) -> None:
    """InputError for a tracker that is unknown or not installed, before anything starts."""
    for name in names:
        if name not in PACKAGES:
            raise InputError(f"unknown tracker {name!r} in tracking.trackers; use {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"tracking.trackers names {name}, which is not installed: pip install {PACKAGES[name]}")


def open_trackers(names: list[str], project: str, run: str, folder: Path, settings: dict[str, Any]) -> list[Tracker]:
    """Start, or go on with, this run in each tracker.

    Args:
        names: of PACKAGES.
        project: groups runs (MLflow's experiment).
        run: its name there.
        folder: the run's; RECORD in it remembers the tracker's own id, so that a resumed run goes on in the same place.
        settings: shown as the run's configuration.
    """
    check_trackers(names)
    record = folder / RECORD
    known: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    opened: list[Tracker] = []
    for name in names:
        tracker, known[name] = STARTS[name](project, run, folder, settings, known.get(name))
        opened.append(tracker)
    if names:
        write_whole(record, json.dumps(known, indent=1) + "\n")
    return opened


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


class _Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def _start_wandb(
    project: str, run: str, folder: Path, settings: dict[str, Any], known: str | None
) -> tuple[Tracker, str]:
    import wandb

    started = wandb.init(
        project=project, name=run, dir=str(folder), config=settings, id=known, resume="allow" if known else None
    )
    return _Wandb(started), str(started.id)


def _start_trackio(
    project: str, run: str, folder: Path, settings: dict[str, Any], known: str | None
) -> tuple[Tracker, str]:
    import trackio

    started = trackio.init(project=project, name=known or run, config=settings, resume="allow" if known else "never")
    return _Trackio(started), str(started.name)


def _start_mlflow(
    project: str, run: str, folder: Path, settings: dict[str, Any], known: str | None
) -> tuple[Tracker, str]:
    import mlflow
    from mlflow.entities import Param

    client = mlflow.MlflowClient()
    if known:
        client.update_run(known, "RUNNING")
        return _Mlflow(client, known), known
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    started = client.create_run(experiment_id, run_name=run)
    parameters = [Param(name, str(value)) for name, value in flat(settings)]
    for first in range(0, len(parameters), MLFLOW_BATCH):
        client.log_batch(started.info.run_id, params=parameters[first : first + MLFLOW_BATCH])
    return _Mlflow(client, started.info.run_id), str(started.info.run_id)


STARTS: dict[str, Callable[[str, str, Path, dict[str, Any], str | None], tuple[Tracker, str]]] = {
    "wandb": _start_wandb,
    "trackio": _start_trackio,
    "mlflow": _start_mlflow,
}


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Trackers refuse or garble NaN and infinity; metrics.jsonl keeps them."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
