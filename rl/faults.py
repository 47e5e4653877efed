"""Waiting for actors with a deadline, and the one line that says why a run cannot go on."""

from __future__ import annotations

import errno
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from plumbline.errors import InputError, RunStopped
from plumbline.rl.checkpoint import CheckpointStore

# After a first failure the others get so long to report theirs: the death of one learner shows itself in all of them,
# and only the dead one's error names the cause.
GRACE_SECONDS = 3.0
LAST_WORDS = 200
FAILURE = "failure.txt"
# No space, quota used up, file larger than allowed, and a broken device.
DISK_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class RoleFailed(RunStopped):
    """A worker or learner died, or raised what nobody can put right."""


class DeadlinePassed(RunStopped):
    """Something took longer than its limit."""


@dataclass(frozen=True)
class Place:
    """Where an actor lives.

    Attributes:
        name: by role and number, as the dashboard shows it.
        pid: of its process.
        node: address of its machine.
        log: file on that machine with what it writes to standard error.
        gpus: that Ray lets it see, as in CUDA_VISIBLE_DEVICES.
    """

    name: str
    pid: int
    node: str
    log: str
    gpus: tuple[str, ...] = ()

    def last_words(self) -> str:
        """The log, and its last line if the file can be read from here."""
        try:
            lines = [line.strip() for line in Path(self.log).read_text(encoding="utf-8", errors="replace").splitlines()]
        except OSError:
            return f"its log is {self.log} on {self.node}"
        last = next((line for line in reversed(lines) if line and not line.startswith(":")), None)
        said = f"ends with {last[-LAST_WORDS:]!r}" if last else "is empty"
        return f"its log {self.log} {said}"


def own_place() -> Place:
    """Of the actor this process is."""
    context = ray.get_runtime_context()
    log = ray._private.worker.global_worker.get_err_file_path()
    gpus = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    name = context.get_actor_name() or "unnamed"
    return Place(name, os.getpid(), ray.util.get_node_ip_address(), str(log), gpus)


def tell(error: BaseException, place: Place) -> str:
    """One line: who failed, of what, and where to read more."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return f"{place.name} raised {type(cause).__name__}: {first_line(cause)}"
    if isinstance(error, RayActorError):
        text = str(error)
        _, found, detail = text.partition("Worker exit detail: ")
        detail = detail if found else text.replace("\n", " ")
        # Ray adds a paragraph of what it might have been.
        detail = detail.partition(" Some common causes")[0].strip().rstrip(".")
        return f"{place.name} (process {place.pid} on {place.node}) died: {detail[:300]}; {place.last_words()}"
    return f"{place.name}: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Of its message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def user_error(error: BaseException) -> BaseException | None:
    """What an actor raised for people to read: bad input, a reason to stop, the disk's refusal. None: something else."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, InputError | RunStopped | OSError) else None


def gather(calls: Sequence[tuple[Place, Any]], limit: tuple[str, float], doing: str) -> list[Any]:
    """Results of calls to actors, in order.

    Args:
        calls: who was called, and the reference to the result.
        limit: the setting that bounds the wait, and its seconds.
        doing: what is waited for, as a sentence begins: "update of step 3".

    Raises:
        DeadlinePassed: names who has not answered.
        RoleFailed: names the dead actor, or the one that raised; InputError, RunStopped and OSError pass as they are.
    """
    setting, seconds = limit
    places = {reference: place for place, reference in calls}
    waiting = list(places)
    deadline = time.monotonic() + seconds
    results: dict[Any, Any] = {}
    failures: dict[Any, RayError] = {}
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            break
        for reference in ready:
            try:
                results[reference] = ray.get(reference)
            except RayError as error:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures[reference] = error
    if failures:
        dead = [reference for reference, error in failures.items() if isinstance(error, RayActorError)]
        reference = dead[0] if dead else next(iter(failures))
        failure = failures[reference]
        plain = user_error(failure)
        if plain is not None:
            raise plain from failure
        raise RoleFailed(f"{doing}: {tell(failure, places[reference])}") from failure
    if waiting:
        names = ", ".join(places[reference].name for reference in waiting)
        raise DeadlinePassed(
            f"{doing}: no answer from {names} within {setting} = {seconds:g} s; {places[waiting[0]].last_words()}"
        )
    return [results[reference] for _, reference in calls]


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Within the block, what stops a run leaves with the way to go on in its message, and its traceback in failure.txt.

    Args:
        folder: the run's, whose checkpoints (or whose stages' checkpoints) are named.
    """
    try:
        yield
    except RunStopped as error:
        raise RunStopped(_with_the_way_on(str(error), folder)) from error
    except OSError as error:
        if error.errno not in DISK_REFUSALS:
            raise
        what = f"{error.filename}: " if error.filename else ""
        raise RunStopped(_with_the_way_on(f"{what}{error.strerror}", folder)) from error


def _with_the_way_on(message: str, folder: Path) -> str:
    stores = sorted(folder.rglob("checkpoints"), key=lambda path: path.stat().st_mtime)
    newest = [paths[-1] for path in stores if (paths := CheckpointStore(path, 1).paths())]
    way = f"--resume goes on from {newest[-1]}" if newest else "no checkpoint was written yet, --resume begins again"
    report = folder / FAILURE
    try:
        report.write_text(traceback.format_exc(), encoding="utf-8")
        details = f"; details: {report}"
    except OSError:  # a full disk: the line itself must do
        details = ""
    return f"{message}; {way}{details}"
