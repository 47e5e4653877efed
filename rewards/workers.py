"""Grading in processes that can be killed: a hang costs its time limit, never a worker."""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from plumbline.rewards.verdict import Reason, Verdict
from plumbline.rewards.verifier import settle

START_SECONDS = 60.0


class Child:
    """One grading process; started when first needed, started again after a kill."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, answer: str, gold: str, timeout: float) -> tuple[Reason, float]:
        """(reason, seconds). `timeout` when the limit passed, `error` when the child died of the question."""
        process = self._running()
        assert process.stdin is not None
        began = time.perf_counter()
        try:
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            process.stdin.flush()
            line = self._line(began + timeout)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            self.kill()
            return "error", time.perf_counter() - began
        if line is None:
            self.kill()
            return "timeout", time.perf_counter() - began
        return json.loads(line)[0], time.perf_counter() - began

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "plumbline.rewards.child", str(self.memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            ready = self._line(time.perf_counter() + START_SECONDS)
        except EOFError:
            ready = b""
        if ready != b"ready\n":
            self.kill()
            raise RuntimeError(f"the grading process did not start within {START_SECONDS:g} s; is math-verify installed for {sys.executable}?")
        return self.process

    def _line(self, deadline: float) -> bytes | None:
        """One line of the child's output, None when the deadline passes first, EOFError when the child is gone."""
        assert self.process is not None and self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        buffer = b""
        while not buffer.endswith(b"\n"):
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            piece = os.read(pipe, 65536)
            if not piece:
                raise EOFError
            buffer += piece
        return buffer

    def kill(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # unsent input of a dead child
        self.process = None


class Grader:
    """A pool of killable grading processes. Thread-safe; nothing is started before a slow pair comes.

    Args:
        processes: children that compare at once.
        timeout: seconds for one answer.
        memory_gib: memory of one child over what its libraries take.
    """

    def __init__(self, processes: int = 1, timeout: float = 2.0, memory_gib: float = 0.5) -> None:
        if processes < 1 or timeout <= 0 or memory_gib <= 0:
            raise ValueError(f"processes ({processes}), timeout ({timeout}) and memory_gib ({memory_gib}) must be positive")
        self.timeout = timeout
        self.children = [Child(int(memory_gib * 2**30)) for _ in range(processes)]
        self.idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self.children:
            self.idle.put(child)

    def grade_many(self, pairs: Sequence[tuple[str, str]], *, boxed_only: bool = True) -> list[Verdict]:
        """Verdicts of (response, gold) pairs, in order."""
        settled = [settle(response, gold, boxed_only) for response, gold in pairs]
        slow = [number for number, item in enumerate(settled) if not isinstance(item, Verdict)]
        if len(slow) > 1 and len(self.children) > 1:
            with ThreadPoolExecutor(len(self.children)) as pool:
                answers = list(pool.map(self._compare, [settled[number] for number in slow]))
        else:
            answers = [self._compare(settled[number]) for number in slow]
        for number, verdict in zip(slow, answers, strict=True):
            settled[number] = verdict
        return [item for item in settled if isinstance(item, Verdict)]

    def _compare(self, pair: Verdict | tuple[str, str]) -> Verdict:
        assert not isinstance(pair, Verdict)
        child = self.idle.get()
        try:
            reason, seconds = child.compare(*pair, self.timeout)
        finally:
            self.idle.put(child)
        return Verdict(reason == "correct", reason, pair[0], seconds)

    def close(self) -> None:
        """End the children. The grader may be used again; it then starts new ones."""
        for _ in self.children:
            child = self.idle.get()
            child.kill()
            self.idle.put(child)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_shared: dict[float, Grader] = {}
_lock = threading.Lock()


def shared_grader(timeout: float) -> Grader:
    """This process's own grader for a time limit, ended at exit."""
    with _lock:
        if timeout not in _shared:
            _shared[timeout] = Grader(1, timeout)
            atexit.register(_shared[timeout].close)
        return _shared[timeout]
