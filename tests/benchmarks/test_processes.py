"""Measurements in processes of their own: what fails or hangs is named, and keeps what it had."""

import os
import time

import pytest

from benchmarks import processes
from benchmarks.processes import run_alone

MODULE = """
import os, subprocess, sys, time

def good(settings, keep):
    keep({"a": settings["a"], "variable": os.environ["WANTED"]})
    keep({"b": 2})

def broken(settings, keep):
    keep({"a": 1})
    raise ValueError("nothing\\nto measure")

def killed(settings, keep):
    keep({"a": 1})
    print("before the end", flush=True)
    os._exit(7)

def slow(settings, keep):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    keep({"child": child.pid})
    time.sleep(100)

def lingers(settings, keep):
    import threading
    keep({"a": 1})
    threading.Thread(target=time.sleep, args=(100,)).start()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "measured.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call(name, seconds=30, **settings):
        return run_alone(
            f"measured:{name}", settings, tmp_path / name, seconds=seconds, environment={"WANTED": "given"}
        )

    return call


def test_what_was_kept_comes_back(run):
    record = run("good", a=[1, 2])
    assert record.pop("process_seconds") > 0
    assert record == {"a": [1, 2], "b": 2, "variable": "given"}


def test_an_exception_is_named(run):
    record = run("broken")
    assert record["failed"] == "ValueError: nothing to measure"
    assert record["a"] == 1
    assert any("ValueError" in line for line in record["last_words"])


def test_a_death_is_named(run):
    record = run("killed")
    assert record["failed"] == "the process ended with code 7"
    assert record["a"] == 1
    assert record["last_words"] == ["before the end"]


def test_too_slow_is_cut_off_with_its_children(run):
    record = run("slow", seconds=2)
    assert record["failed"] == "not done after 2 s"
    for _ in range(100):
        try:
            with open(f"/proc/{record['child']}/stat") as file:
                gone = file.read().split()[2] == "Z"
        except FileNotFoundError:
            gone = True
        if gone:
            break
        time.sleep(0.05)
    assert gone


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="asks Linux")
def test_a_measurement_that_is_complete_may_hang_at_its_end(run, monkeypatch):
    monkeypatch.setattr(processes, "ENDING_SECONDS", 0.5)
    record = run("lingers")
    assert "failed" not in record
    assert record["a"] == 1
    assert record["process_seconds"] < 25


def test_an_older_answer_is_not_taken_for_this_one(run, tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "answer.json").write_text('{"complete": true, "a": 5, "b": 6}')
    record = run("killed")
    assert "b" not in record
    assert "failed" in record
