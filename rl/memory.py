"""Peak resident memory of this process and everything it started (Ray's processes included)."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class MemoryWatch:
    """Samples the process tree in a thread; `peak_mb` is the largest total seen.

    Each process counts its private pages plus its share of the shared ones (PSS), so that the object store is counted
    once. Where the system does not tell PSS, resident size stands in, which counts shared pages again.

    Args:
        interval: seconds between samples.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.interval = interval
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    @property
    def peak_mb(self) -> float:
        return self.peak_bytes / 1e6

    def sample(self) -> int:
        """Bytes now."""
        total = 0
        root = psutil.Process()
        for process in [root, *root.children(recursive=True)]:
            try:
                info = process.memory_full_info()
                total += getattr(info, "pss", info.rss)
            except psutil.Error:
                continue  # it ended between the listing and the look
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self.sample()

    def __enter__(self) -> MemoryWatch:
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sample()
        self._stop.set()
        self._thread.join()
