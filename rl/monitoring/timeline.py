"""One step as a timeline: which actor did what when, to be opened in Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ray

from plumbline.rl.files import write_whole

# Task events reach the head node once a second.
SETTLE_SECONDS = 3.0
MOST_TASKS = 10_000


def export_timeline(path: Path, step: int, began: float, ended: float) -> int:
    """Write the calls of this job's actors that overlap [began, ended] as a Chrome trace.

    Args:
        path: JSON file.
        step: named in the trace.
        began, ended: seconds since the epoch.

    Returns:
        How many calls it shows.

    Raises:
        RuntimeError: Ray's dashboard, which knows the calls, is off.
    """
    from ray.util.state import list_actors, list_tasks
    from ray.util.state.exception import RayStateApiException

    time.sleep(SETTLE_SECONDS)
    context = ray.get_runtime_context()
    # Without an address the state API looks for a cluster by itself, and there may be several on the machine.
    where: dict[str, Any] = {
        "filters": [("job_id", "=", context.get_job_id())],
        "address": context.gcs_address,
        "raise_on_missing_output": False,
    }
    try:
        actors = {a.actor_id: a.name or a.class_name for a in list_actors(limit=1000, **where)}
        tasks = list_tasks(limit=MOST_TASKS, detail=True, **where)
    except (RayStateApiException, ConnectionError) as error:
        raise RuntimeError(
            f"no timeline: Ray's dashboard does not answer ({' '.join(str(error).split())[:200]})"
        ) from None
    events: list[dict[str, Any]] = [_event("driver", f"step {step}", began, ended, {})]
    for task in tasks:
        if task.start_time_ms is None or not task.actor_id:
            continue
        start = task.start_time_ms / 1000
        end = task.end_time_ms / 1000 if task.end_time_ms else ended
        if end < began or start > ended:
            continue
        row = actors.get(task.actor_id, task.actor_id)
        events.append(_event(row, str(task.name), start, end, {"task": task.task_id, "state": task.state}))
    rows = {name: number for number, name in enumerate(dict.fromkeys(event["tid"] for event in events), start=1)}
    named = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
        for name, number in rows.items()
    ]
    for event in events:
        event["tid"] = rows[event["tid"]]
    write_whole(path, json.dumps({"traceEvents": named + events, "displayTimeUnit": "ms"}))
    return len(events) - 1


def _event(row: str, name: str, start: float, end: float, about: dict[str, Any]) -> dict[str, Any]:
    """A complete event; Chrome counts in microseconds."""
    return {"ph": "X", "name": name, "pid": 1, "tid": row, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": about}
