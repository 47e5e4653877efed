"""What a run says while it works: metrics.jsonl, TensorBoard, Prometheus, trackers, and one progress line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plumbline.rl.config import RunConfig
from plumbline.rl.files import read_rows, writing
from plumbline.rl.monitoring.publish import StepPublisher
from plumbline.rl.monitoring.timeline import export_timeline
from plumbline.rl.trackers import finite, open_trackers


class Telemetry:
    """Writes each step's metrics to metrics.jsonl and tensorboard/ in the run's folder, publishes them for Prometheus,
    passes them to the trackers, and keeps a progress line.

    Args:
        config: the run's.
        start: steps already done; later rows of an earlier attempt are dropped.
        console: where the line goes; on a terminal it updates in place, elsewhere a plain line comes now and then.
    """

    def __init__(self, config: RunConfig, start: int, console: Console) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, label, total = config.folder, config.name, config.steps
        self.config = config
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= start]
        self.file = self.path.open("w", encoding="utf-8")
        with writing(self.path):
            self.file.writelines(json.dumps(row) + "\n" for row in kept)
            self.file.flush()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.trackers = open_trackers(
            config.tracking.trackers, config.tracking.project, label, folder, config.model_dump(mode="json")
        )
        self.publisher = StepPublisher(label)
        self.console = console
        self.label = label
        self.step_began = time.time()
        self.total = total
        self.last_line = 0.0
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(label, total=total, completed=start, figures="starting")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record one step (counted from 1)."""
        row = {"step": step, "time": time.time(), **metrics}
        with writing(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        for tracker in self.trackers:
            tracker.log(step, finite(metrics))
        self.publisher.publish(row)
        figures = f"reward {metrics['reward/mean']:.3f}  correct {metrics['reward/correct']:.1%}  {metrics['rollout/tokens_per_second']:,.0f} tok/s"
        self.progress.update(self.task, completed=step, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (step == self.total or now - self.last_line > 10):
            self.last_line = now
            left = (self.total - step) * metrics["time/step_seconds"]
            self.console.print(f"{self.label}  step {step}/{self.total}  {figures}  ETA {left:.0f} s", highlight=False)
        if step == self.config.ray.timeline_step:
            self.console.print(f"{self.label}  {self._timeline(step, row['time'])}", highlight=False)
        self.step_began = time.time()

    def _timeline(self, step: int, ended: float) -> str:
        """Write the timeline; a run does not end because a picture of it could not be had, so the reason is said."""
        path = self.config.folder / f"timeline-step-{step:06d}.json"
        try:
            return f"{export_timeline(path, step, self.step_began, ended)} calls of step {step} in {path}"
        except RuntimeError as error:
            return str(error)

    def __enter__(self) -> Telemetry:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        with writing(self.path):  # what could not be written is tried again here
            self.file.close()
        self.board.close()
        self.publisher.close()
        for tracker in self.trackers:
            tracker.close(failed=error is not None)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a torn last line (the process was killed) is left out."""
    path = folder / "metrics.jsonl"
    return read_rows(path) if path.exists() else []
