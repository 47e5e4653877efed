"""The workers of one role, and another in the place of one that died."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from plumbline.rl.faults import Place, RoleFailed, gather, tell, user_error

log = logging.getLogger(__name__)


class Pool(list[Any]):
    """Handles of a role's actors, by number. Thread-safe.

    Args:
        role: `rollout` or `reward`.
        count: of workers.
        make: (number, how many this number had before) -> a handle.
        start_limit: the setting and seconds within which a worker must come up; see faults.gather.

    Attributes:
        prepare: what a new worker must do before it is one of the others; it may raise as `gather` does.
        most: replacements between two calls of `settle`; one more ends the run.
        replaced: all of them.
    """

    def __init__(
        self, role: str, count: int, make: Callable[[int, int], Any], start_limit: tuple[str, float], most: int = 0
    ) -> None:
        super().__init__(make(number, 0) for number in range(count))
        self.role, self.make, self.start_limit, self.most = role, make, start_limit, most
        self.prepare: Callable[[Any, Place], None] = lambda handle, place: None
        self.places = [Place(f"{role}-{number}", 0, "an unknown machine", "not known yet") for number in range(count)]
        self.before = [0] * count
        self.replaced = self.unsettled = 0
        self.lock = threading.RLock()
        self.closed = False

    def calls(self, method: str, *arguments: Any) -> list[tuple[Place, Any]]:
        """Call a method on every worker; for `gather`."""
        return [
            (place, getattr(handle, method).remote(*arguments)) for place, handle in zip(self.places, self, strict=True)
        ]

    def each(self, method: str, arguments: Sequence[Any], limit: tuple[str, float], doing: str) -> list[Any]:
        """Call a method on every worker, each with its own argument; one that fails is replaced and the new one asked.

        See `gather` for limit, doing and what is raised.
        """
        handles = list(self)
        calls = [getattr(handle, method).remote(own) for handle, own in zip(handles, arguments, strict=True)]
        results = []
        for number, (handle, call, own) in enumerate(zip(handles, calls, arguments, strict=True)):
            while True:
                try:
                    results += gather([(self.places[number], call)], limit, doing)
                    break
                except RoleFailed as error:
                    self.replace(number, handle, str(error))
                    handle = self[number]
                    call = getattr(handle, method).remote(own)
        return results

    def replace(self, number: int, handle: Any, error: BaseException | str) -> None:
        """Another worker in the place of `handle`, unless that has been done already.

        Raises:
            RoleFailed: too many were replaced, or the new one does not come up; names the last cause.
            InputError, RunStopped, OSError: what the worker raised is for people to read.
        """
        with self.lock:
            if self.closed or self[number] is not handle:
                return
            if isinstance(error, str):
                cause = error
            else:
                plain = user_error(error)
                if plain is not None:
                    raise plain from error
                cause = tell(error, self.places[number])
            if self.unsettled >= self.most:
                raise RoleFailed(
                    f"{cause}; {self.unsettled} {self.role} workers were replaced in this step before it "
                    f"(ray.replacements_per_step = {self.most})"
                )
            self.unsettled += 1
            self.replaced += 1
            self.before[number] += 1
            ray.kill(handle)
            log.warning("%s; another takes its place", cause)
            fresh = self.make(number, self.before[number])
            doing = f"another {self.role} worker"
            (place,) = gather([(self.places[number], fresh.place.remote())], self.start_limit, doing)
            try:
                self.prepare(fresh, place)
            except RayError as failed:
                raise RoleFailed(f"{doing}: {tell(failed, place)}") from failed
            self.places[number] = place
            self[number] = fresh

    def settle(self) -> None:
        """What was asked for is done: replacements are counted from 0 again."""
        with self.lock:
            self.unsettled = 0

    def close(self) -> None:
        """End the workers; nothing is replaced any more."""
        with self.lock:
            self.closed = True
            for handle in self:
                ray.kill(handle)
