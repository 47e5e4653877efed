"""What the job page of the Ray dashboard says of a run, and what its actors are called."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import ray

from plumbline import __version__

# Set by `ray job submit` in the process it starts.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_starts = itertools.count(1)


def actor_namer() -> Callable[[str, int], str]:
    """Names by role: rollout-0, reward-1, learner-0. A second set of actors in this process gets rollout-0.2 and so on,
    since Ray frees the names of killed actors only after a while."""
    start = next(_starts)
    suffix = "" if start == 1 else f".{start}"
    return lambda role, number: f"{role}-{number}{suffix}"


def job_metadata(name: str, folder: Path) -> dict[str, str]:
    """For the job page: what runs, and where its files are."""
    return {"plumbline_run": name, "plumbline_folder": str(folder.resolve()), "plumbline_version": __version__}


def submission_id() -> str | None:
    """Of the job that `ray job submit` started and this process is; None if it is none."""
    injected = os.environ.get(JOB_VARIABLE)
    if not injected:
        return None
    return json.loads(injected).get("metadata", {}).get("job_submission_id")


def show_on_job_page(metadata: dict[str, str]) -> str | None:
    """Add to the metadata that the job page of a submitted job shows. Returns why it could not be done, if so.

    Ray takes this metadata at submission only; the store behind it is not part of its public interface, so a Ray that
    has moved it costs the entry on the page and nothing else.
    """
    wanted = submission_id()
    if wanted is None:
        return None
    try:
        from dataclasses import replace

        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        async def add() -> None:
            client = JobInfoStorageClient(GcsClient(address=ray.get_runtime_context().gcs_address))
            info = await client.get_info(wanted)
            if info is not None:
                await client.put_info(wanted, replace(info, metadata={**(info.metadata or {}), **metadata}))

        asyncio.run(add())
    except (ImportError, AttributeError, TypeError, RuntimeError) as error:
        return f"the job page does not show the run's folder: {' '.join(str(error).split())[:200]}"
    return None
