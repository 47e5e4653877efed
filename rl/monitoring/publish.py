"""Publishing the catalogue's metrics through ray.util.metrics, in the process of the role that knows them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import ray
from ray.util import metrics as ray_metrics

from plumbline.rl.batch import Group
from plumbline.rl.monitoring.catalogue import BY_NAME, METRICS


@cache
def instrument(name: str) -> Any:
    """The Ray metric of a catalogue entry, one a process."""
    metric = BY_NAME[name]
    owner = "run" if metric.role == "driver" else "actor"
    keys = (owner, *metric.tags)
    about = f"{metric.about} Unit: {metric.unit}."
    if metric.kind == "histogram":
        return ray_metrics.Histogram(name, about, boundaries=list(metric.bounds), tag_keys=keys)
    kind = ray_metrics.Counter if metric.kind == "counter" else ray_metrics.Gauge
    return kind(name, about, tag_keys=keys)


class StepPublisher:
    """Keeps the driver's gauges at the last row of metrics.jsonl.

    Ray exports a gauge once each time it is set. A step may last many scrapes, so a thread sets them again and again
    until `close`; without Ray nobody listens and nothing happens.

    Args:
        run: the label.
        interval: seconds between two settings.
    """

    def __init__(self, run: str, interval: float = 5.0) -> None:
        self.run = run
        self.interval = interval
        self.row: Mapping[str, float] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._repeat, name="step-publisher", daemon=True)
        self.thread.start()

    def publish(self, row: Mapping[str, float]) -> None:
        self.row = row
        if not ray.is_initialized():
            return
        for metric in METRICS:
            if metric.key in row:
                instrument(metric.name).set(row[metric.key], tags={"run": self.run})

    def close(self) -> None:
        self.ended.set()
        self.thread.join()

    def _repeat(self) -> None:
        while not self.ended.wait(self.interval):
            self.publish(self.row)


def publish_grading_queue(run: str, groups: int) -> None:
    """Groups that graders have not given back."""
    instrument("plumbline_grading_queue_groups").set(groups, tags={"run": run})


def actor_name() -> str:
    """Of the actor this process is."""
    return ray.get_runtime_context().get_actor_name() or "unnamed"


def watch_rollout(groups: Iterator[Group | None], prompts: int) -> Iterator[Group | None]:
    """Pass groups (and the pauses between them) on, counting what was generated and what is still to come."""
    tags = {"actor": actor_name()}
    queue = instrument("plumbline_rollout_queue_prompts")
    queue.set(prompts, tags=tags)
    for group in groups:
        if group is None:
            yield None
            continue
        prompts -= 1
        queue.set(prompts, tags=tags)
        tokens = sum(len(completion.token_ids) for completion in group.completions)
        instrument("plumbline_generated_tokens").inc(tokens, tags=tags)
        instrument("plumbline_generated_completions").inc(len(group.completions), tags=tags)
        yield group
    publish_gpu_memory()


def watch_grading(group: Group, began: float) -> Group:
    """Count a graded group's verdicts; `began` is time.monotonic() at its start."""
    tags = {"actor": actor_name()}
    instrument("plumbline_grading_seconds").observe(time.monotonic() - began, tags=tags)
    for reason in set(group.reasons):
        instrument("plumbline_graded_completions").inc(group.reasons.count(reason), tags={**tags, "reason": reason})
    return group


def watch_update(began: float) -> None:
    """Record the time of one update of the learner; `began` is time.monotonic() at its start."""
    instrument("plumbline_learner_update_seconds").observe(time.monotonic() - began, tags={"actor": actor_name()})
    publish_gpu_memory()


def publish_gpu_memory() -> None:
    """Torch's peak since the last call, if this process uses a GPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        instrument("plumbline_gpu_memory_bytes").set(torch.cuda.max_memory_allocated(), tags={"actor": actor_name()})
        torch.cuda.reset_peak_memory_stats()
