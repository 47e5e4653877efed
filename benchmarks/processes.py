"""Measurements in processes of their own: one that fails, hangs or is killed is named and takes nothing with it.

    python -m benchmarks.processes MODULE:FUNCTION SETTINGS.json ANSWER.json

FUNCTION(settings, keep) measures; keep(record) writes what it has so far, so that a measurement which is cut off leaves
what it had.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a process may take to end once its figures are complete; engines that hang in their shutdown are killed then.
ENDING_SECONDS = 20.0
# Lines of a failed process's output that are shown.
LINES_SHOWN = 15

Keep = Callable[[dict[str, Any]], None]


def run_alone(
    target: str, settings: dict[str, Any], folder: Path, *, seconds: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Measure in a process of its own; everything that it started ends with it.

    Args:
        target: MODULE:FUNCTION.
        settings: handed to the function; JSON.
        folder: for the settings, the answer and the output (`log`); made if absent.
        seconds: the process is killed after so many.
        environment: variables that it sees beside this process's.

    Returns:
        what the function kept last, with `process_seconds` from start to end. Unless it came to its end there are
        `failed`, one line that says why, and `last_words`, the end of its output.
    """
    folder = folder.resolve()  # the process runs in the repository's root
    folder.mkdir(parents=True, exist_ok=True)
    asked, answer, log = (folder / name for name in ("settings.json", "answer.json", "log"))
    asked.write_text(json.dumps(settings, default=str), encoding="utf-8")
    answer.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.processes", target, str(asked), str(answer)]
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            late = _wait(process, answer, began + seconds)
        finally:
            _kill_group(process)
    record = _read(answer)
    record["process_seconds"] = time.perf_counter() - began
    if not record.pop("complete", False):
        why = f"not done after {seconds:g} s" if late else f"the process ended with code {process.returncode}"
        record["failed"] = why if late else record.get("failed") or why
        record["last_words"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
    return record


def run_each(
    result: dict[str, Any],
    kind: str,
    names: Iterable[str],
    run: Callable[[str, Path], dict[str, Any]],
    shown: Callable[[str, dict[str, Any]], Iterable[str]],
    out: Path | None,
) -> None:
    """Measure one after the other, and lose nothing that was measured.

    Args:
        result: its result[kind] takes each record under its name, and result["machine"] the first machine told of.
        run: (name, folder for its process's files) -> a record; see run_alone.
        shown: (name, record) -> lines to print.
        out: result is written there after each, the processes' files beside it. None: kept nowhere.
    """
    with tempfile.TemporaryDirectory() as scratch:
        logs = out.with_suffix("") if out else Path(scratch)
        for name in names:
            result[kind][name] = record = run(name, logs / name)
            if "machine" in record:
                result.setdefault("machine", record["machine"])
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                write(out, result)
            print("\n".join(shown(name, record)), flush=True)


def failure(record: dict[str, Any]) -> Iterator[str]:
    """Lines on a record that failed; none on others."""
    if "failed" in record:
        yield f"  FAILED: {record['failed']}"
        yield from (f"  | {line}" for line in record.get("last_words", []))


def _wait(process: subprocess.Popen[bytes], answer: Path, deadline: float) -> bool:
    """Until the process has ended, or a while after it has said all. True: it had to be cut off."""
    ending: float | None = None
    while process.poll() is None:
        now = time.perf_counter()
        if ending is None and _read(answer).get("complete"):
            ending = now
        if ending is not None and now > ending + ENDING_SECONDS:
            return False
        if now > deadline:
            return True
        time.sleep(0.2)
    return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process was made the first of a session: its children are killed with it, and only they."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> None:
    target, asked, answer = sys.argv[1:]
    module, _, name = target.partition(":")
    kept: dict[str, Any] = {}

    def keep(record: dict[str, Any]) -> None:
        kept.update(record)
        write(Path(answer), kept)

    try:
        function = getattr(importlib.import_module(module), name)
        function(json.loads(Path(asked).read_text(encoding="utf-8")), keep)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        keep({"failed": f"{type(error).__name__}: {text[:400]}"})
        sys.exit(1)
    keep({"complete": True})


if __name__ == "__main__":
    main()
