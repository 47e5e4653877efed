"""Grading in processes that can be killed: a hang costs its time limit, never a worker."""

from __future__ import annotations

import atexit
import contextlib
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

# Starting a child takes a tenth of a second on an idle machine; the second checker imports SymPy and takes a second or two.
# A batch waits so long for children to come up on a loaded machine, and does not count it against an answer.
START_SECONDS = 20.0
SECOND_START_SECONDS = 60.0
# Threads that may have a slow answer compared at the same moment by `grade`; each costs a process only when it comes to that.
SHARED_PROCESSES = 64


class Child:
    """One grading process; started when first needed, started again after a kill.

    Args:
        memory_bytes: how much its address space may grow over what its libraries take.
        second: run the second checker (math-verify) in place of this project's own comparison.
    """

    def __init__(self, memory_bytes: int, second: bool = False) -> None:
        self.memory_bytes = memory_bytes
        self.second = second
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False

    def compare(self, answer: str, gold: str, timeout: float, *, start_seconds: float) -> tuple[Reason, float]:
        """(reason, seconds). `timeout` when the limit passed; `error` when the child died of the question.

        Args:
            timeout: seconds for the answer.
            start_seconds: what a child that is not up yet may take for it on top.
        """
        began = time.perf_counter()
        up = False
        try:
            up = self._up(began + timeout + start_seconds)
            if not up:
                return "timeout", time.perf_counter() - began  # left to come up for the next question
            deadline = time.perf_counter() + timeout if start_seconds else began + timeout
            assert self.process is not None and self.process.stdin is not None  # noqa: PT018
            self.process.stdin.write(json.dumps([answer, gold, timeout]).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line(deadline)
        except (OSError, EOFError, ValueError):
            self.restart()
            return "error", time.perf_counter() - began
        if line is None:
            self.restart()
            return "timeout", time.perf_counter() - began
        return json.loads(line)[0], time.perf_counter() - began

    def start(self) -> None:
        """Start the process unless it runs; does not wait for it."""
        if self.process is not None and self.process.poll() is None:
            return
        self.kill()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        arguments = [str(self.memory_bytes), *(["second"] if self.second else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "plumbline.rewards.child", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def restart(self) -> None:
        """Kill it and start another at once, so that it is up when the next question comes."""
        self.kill()
        with contextlib.suppress(OSError):  # no process to be had: the next question tries again
            self.start()

    def _up(self, deadline: float) -> bool:
        """Whether the process is ready for a question by then."""
        self.start()
        if not self.ready:
            ready = self._line(deadline)
            if ready is None:
                return False
            if ready != b"ready\n":
                raise EOFError
            self.ready = True
        return True

    def _line(self, deadline: float) -> bytes | None:
        """One line of the child's output, None when the deadline passes first, EOFError when the child is gone."""
        assert self.process is not None and self.process.stdout is not None  # noqa: PT018
        pipe = self.process.stdout.fileno()
        buffer = b""
        poll = select.poll()  # select() knows no descriptor above 1023
        poll.register(pipe, select.POLLIN | select.POLLHUP)
        while not buffer.endswith(b"\n"):
            left = deadline - time.perf_counter()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            piece = os.read(pipe, 65536)
            if not piece:
                raise EOFError
            buffer += piece
        return buffer

    def kill(self) -> None:
        self.ready = False
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent input of a dead child
                    pipe.close()
        self.process = None


class Grader:
    """A pool of killable grading processes. Thread-safe; nothing is started before a slow pair comes.

    Args:
        processes: children that compare at once.
        timeout: seconds for one answer.
        memory_gib: memory of one child over what its libraries take.
        second: compare with the second checker (math-verify) instead; every pair then goes to a child.
    """

    def __init__(
        self, processes: int = 1, timeout: float = 2.0, memory_gib: float = 0.5, *, second: bool = False
    ) -> None:
        if processes < 1 or timeout <= 0 or memory_gib <= 0:
            raise ValueError(
                f"processes ({processes}), timeout ({timeout}) and memory_gib ({memory_gib}) must be positive"
            )
        self.timeout = timeout
        self.children = [Child(int(memory_gib * 2**30), second) for _ in range(processes)]
        # Last in, first out: a child that runs already is taken before one that must start.
        self.idle: queue.LifoQueue[Child] = queue.LifoQueue()
        for child in self.children:
            self.idle.put(child)

    def grade_many(self, pairs: Sequence[tuple[str, str]], *, boxed_only: bool = True) -> list[Verdict]:
        """Verdicts of (response, gold) pairs, in order."""
        settled = [settle(response, gold, boxed_only) for response, gold in pairs]
        slow = {number: item for number, item in enumerate(settled) if not isinstance(item, Verdict)}
        compared = dict(zip(slow, self.compare_many(list(slow.values())), strict=True))
        return [item if isinstance(item, Verdict) else compared[number] for number, item in enumerate(settled)]

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (answer, gold) pairs in the children, in order. A child's start is not counted against an answer."""
        if len(pairs) > 1 and len(self.children) > 1:
            with ThreadPoolExecutor(min(len(self.children), len(pairs), os.cpu_count() or 1)) as pool:
                return list(pool.map(lambda pair: self.compare(*pair, patient=True), pairs))
        return [self.compare(*pair, patient=True) for pair in pairs]

    def compare(self, answer: str, gold: str, *, patient: bool = False) -> Verdict:
        """The verdict of one (answer, gold) pair in a child.

        The time limit covers everything, a child's start and the wait for a free child included; with `patient` only
        the comparison itself, and a child has START_SECONDS more to come up.
        """
        began = time.perf_counter()
        try:
            child = self.idle.get(timeout=None if patient else self.timeout)
        except queue.Empty:
            return Verdict(False, "timeout", answer, time.perf_counter() - began)
        left = self.timeout if patient else max(self.timeout - (time.perf_counter() - began), 0.0)
        start_seconds = 0.0 if not patient else SECOND_START_SECONDS if child.second else START_SECONDS
        try:
            reason, _ = child.compare(answer, gold, left, start_seconds=start_seconds)
        finally:
            self.idle.put(child)
        return Verdict(reason == "correct", reason, answer, time.perf_counter() - began)

    def start(self) -> None:
        """Start all children now, without waiting for them."""
        for child in self.children:
            child.start()

    def close(self) -> None:
        """End the children. The grader may be used again; it then starts new ones."""
        taken = [self.idle.get() for _ in self.children]
        for child in taken:
            child.kill()
            self.idle.put(child)

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_shared: dict[float, Grader] = {}
_lock = threading.Lock()


def shared_grader(timeout: float) -> Grader:
    """This process's own grader for a time limit, ended at exit."""
    with _lock:
        if timeout not in _shared:
            _shared[timeout] = Grader(SHARED_PROCESSES, timeout)
            atexit.register(_shared[timeout].close)
        return _shared[timeout]


def _forget_after_fork() -> None:
    """A forked process must not talk to its parent's children."""
    global _lock
    _shared.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
