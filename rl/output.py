"""The run's folder: made, checked and marked before anything is computed."""

from __future__ import annotations

import json
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path

import yaml

from plumbline import __version__
from plumbline.errors import InputError
from plumbline.rl.config import RunConfig

MARKER = "run.json"


def prepare_output(folder: Path, needed_bytes: int, *, resume: bool, overwrite: bool) -> None:
    """Make the folder, or refuse it with one line: occupied, unwritable, or on a disk with too little room.

    Args:
        folder: where the run writes.
        needed_bytes: what it is expected to write.
        resume: an earlier run's files are wanted.
        overwrite: an earlier run's files go; nothing else is ever deleted.

    Raises:
        InputError: see above.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    occupied = folder.is_dir() and any(folder.iterdir())
    if resume and not (folder / MARKER).exists():
        raise InputError(f"nothing to resume: {folder} holds no earlier run")
    if occupied and not resume:
        if not (folder / MARKER).exists():
            raise InputError(
                f"output folder {folder} holds files that are not a run of plumbline; choose another with output=FOLDER"
            )
        if not overwrite:
            raise InputError(
                f"output folder {folder} holds an earlier run; pass --resume, --overwrite, or another output=FOLDER"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"output folder {folder} cannot be written: {error.strerror}; choose another with output=FOLDER"
        ) from None
    if free < needed_bytes:
        raise InputError(
            f"output folder {folder} has {free / 1e9:.2f} GB free and the run may write {needed_bytes / 1e9:.2f} GB; "
            "free some room, lower checkpoint.keep, or choose another with output=FOLDER"
        )


def lost_with_the_job(folder: Path) -> str | None:
    """A warning when the folder lies in the copy of the working directory that Ray makes for a job, and later deletes."""
    if "working_dir_files" not in folder.resolve().parts:
        return None
    return (
        f"warning: {folder} lies in the job's own copy of the working directory, which Ray deletes; set output=/FOLDER"
    )


def mark_run(config: RunConfig, kind: str) -> None:
    """Write config.yaml (as resolved) and run.json (what made it) into the folder."""
    folder = config.folder
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
    )
    manifest = {
        "kind": kind,
        "name": config.name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
    }
    (folder / MARKER).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    found = {"plumbline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "triton", "transformers", "trl", "ray", "datasets", "math-verify", "sympy", "vllm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
