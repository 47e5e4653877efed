"""How long the workers of each role had nothing to do."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable


class WorkClock:
    """Seconds in which a worker has no call under way. Thread-safe.

    Args:
        workers: of each role.
        now: a clock, in seconds.
    """

    def __init__(self, workers: dict[str, int], now: Callable[[], float] = time.monotonic) -> None:
        self.workers, self.now = workers, now
        self.lock = threading.Lock()
        self.under_way: Counter[tuple[str, int]] = Counter()
        self.since: dict[tuple[str, int], float] = {}
        self.worked = dict.fromkeys(workers, 0.0)
        self.lap_began = now()

    def begin(self, role: str, number: int) -> None:
        """A call to this worker was sent."""
        with self.lock:
            self.under_way[role, number] += 1
            self.since.setdefault((role, number), self.now())

    def end(self, role: str, number: int) -> None:
        """One of its calls came back, or is not waited for any more."""
        with self.lock:
            self.under_way[role, number] -= 1
            if self.under_way[role, number] == 0:
                self.worked[role] += self.now() - self.since.pop((role, number))

    def lap(self) -> dict[str, float]:
        """{role: seconds without work since the last lap, the mean over its workers}."""
        with self.lock:
            now = self.now()
            for (role, number), since in self.since.items():
                self.worked[role] += now - since
                self.since[role, number] = now
            stalls = {
                role: max(0.0, now - self.lap_began - self.worked[role] / count)
                for role, count in self.workers.items()
                if count
            }
            self.worked = dict.fromkeys(self.workers, 0.0)
            self.lap_began = now
            return stalls
