"""Nothing hangs, nothing leaks, and a killed worker costs its neighbours nothing."""

import os
import subprocess
import sys
import threading
import time

import pytest

from plumbline.rewards import workers
from plumbline.rewards.verifier import grade, grade_many
from plumbline.rewards.workers import Grader

BOMBS = [
    "9^{9^{9^9}}", "9^{9^{9^{9^{9}}}}", "((((100!)!)!)!)!", "(((9!)!)!)!", "\\binom{10^{10}}{5\\cdot10^{9}}", "10^{10^{10}}!", "2^{2^{2^{2^{2^{2}}}}}",
    "1" * 100_000, "(" * 50_000 + "1" + ")" * 50_000, "\\frac{1}{" * 3000 + "2" + "}" * 3000, "(x+1)^{100000}", "(a+b+c+d+e+f)^{500}",
    "\\sqrt{" * 1000 + "2" + "}" * 1000, "{" * 2000 + "1" + "}" * 2000, "1+" * 2400 + "1", "--" * 2400 + "1", "\\sin" * 1000 + " 1", "1," * 2400 + "1",
    "\\pm" * 40 + "1", "x^" * 1500 + "2", "10^{-10^{10}}", "\\text{" * 1000 + "a" + "}" * 1000, "a " * 2400, "0." + "12" * 2000 + "...",
    "\\sin(10^{10^{5}})", "\\Gamma(10^{9})", "999999999999!", "\\log_{9^{9^9}} 7^{7^{7^7}}", "(1+\\sqrt2)^{10^8}", "\\sqrt[10^9]{2}", "=" * 3000,
    "(\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7+\\sqrt{11}+\\sqrt{13}+\\sqrt{17})^{30}", "x_{" * 1000 + "1" + "}" * 1000, "\\lfloor 10^{10^{8}} \\rfloor",
    "\\frac{1}{\\sqrt2+\\sqrt3+\\sqrt5+\\sqrt7+\\sqrt{11}+\\sqrt{13}}" * 20, "(1,2)" * 1000, "[" * 4000, "\\begin{pmatrix}" * 200, "|" * 3000,
    "\\cup".join(["(1,2)"] * 400), "1:" * 2000 + "1", "\\{" * 2000 + "\\}" * 2000, "!" * 4000, "5" + "!" * 4000, "^" * 4000, "_" * 4000, "\\" * 4999,
]  # fmt: skip


def processes_of(pid):
    out = subprocess.run(
        ["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return [line for line in out.splitlines() if "ps" not in line and "Z" not in line.split()[-1]]


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_bombs_are_answered_within_the_limit(number):
    for response, gold in (
        (f"\\boxed{{{BOMBS[number]}}}", "7"),
        (f"\\boxed{{{BOMBS[number]}}}", "\\sqrt{2}+\\sin 1"),
        ("\\boxed{7}", BOMBS[number]),
    ):
        began = time.perf_counter()
        verdict = grade(response, gold, timeout=2.0)
        assert time.perf_counter() - began < 2.5
        assert not verdict.correct


def test_neighbours_of_a_killed_worker_keep_their_answers():
    with Grader(processes=2, timeout=10.0) as grader:
        hard = ("\\boxed{\\cos\\frac{\\pi}{7}\\cos\\frac{2\\pi}{7}\\cos\\frac{3\\pi}{7}}", "\\frac18")
        assert grader.grade_many([hard])[0].correct
        for child in grader.children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()
        verdicts = grader.grade_many([hard, ("\\boxed{1}", "1"), hard, ("\\boxed{2}", "1")])
        assert [v.correct for v in verdicts] == [True, True, True, False]


def test_a_child_that_hangs_is_killed_and_replaced():
    hard = ("\\sin^2 x+\\cos^2 x", "1")
    with Grader(timeout=10.0) as grader:
        assert grader.compare(*hard).correct
        child = grader.children[0]
        first = child.process
        os.kill(first.pid, 19)  # SIGSTOP: it answers nothing from now on
        grader.timeout = 0.5
        began = time.perf_counter()
        assert grader.compare(*hard).reason == "timeout"
        assert time.perf_counter() - began < 2.0
        assert first.poll() is not None
        grader.timeout = 10.0
        assert grader.compare(*hard).correct


def test_a_childs_start_counts_against_one_answer_but_not_in_a_batch(monkeypatch):
    hard = ("\\sin^2 x+\\cos^2 x", "1")
    with Grader(timeout=0.5) as grader:
        grader.start()
        pid = grader.children[0].process.pid
        os.kill(pid, 19)  # it comes up too late
        began = time.perf_counter()
        assert grader.compare(*hard).reason == "timeout"
        assert time.perf_counter() - began < 1.5
        monkeypatch.setattr(workers, "START_SECONDS", 1.0)
        began = time.perf_counter()
        assert grader.compare_many([hard])[0].reason == "timeout"
        assert 1.0 < time.perf_counter() - began < 4.0
        monkeypatch.setattr(workers, "START_SECONDS", 60.0)
        grader.timeout = 20.0
        threading.Timer(1.0, os.kill, (pid, 18)).start()
        assert grader.compare_many([hard])[0].correct
        assert grader.children[0].process.pid == pid


def test_a_busy_pool_is_a_timeout_for_one_answer():
    with Grader(timeout=0.2) as grader:
        taken = grader.idle.get()
        assert grader.compare("1", "2").reason == "timeout"
        grader.idle.put(taken)


def test_memory_is_limited():
    with Grader(timeout=10.0, memory_gib=0.5) as grader:
        assert grader.compare("\\sin^2 x+\\cos^2 x", "1").correct
        pid = grader.children[0].process.pid
        with open(f"/proc/{pid}/limits", encoding="ascii") as limits:
            row = next(line for line in limits if line.startswith("Max address space"))
        assert int(row.split()[3]) < 2 * 2**30


def test_from_threads():
    results = []

    def work():
        results.append(grade("\\boxed{\\sin^2 x+\\cos^2 x}", "1", timeout=20.0).correct)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


def test_no_process_outlives_its_parent():
    code = (
        "from plumbline.rewards.verifier import grade\n"
        "from plumbline.rewards.workers import _shared\n"
        "assert grade('\\\\boxed{\\\\sin^2 x+\\\\cos^2 x}', '1', timeout=20.0).correct\n"
        "print(*[c.process.pid for g in _shared.values() for c in g.children if c.process])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert len(out) == 1
    assert not os.path.exists(f"/proc/{out[0]}")


def test_light_import():
    code = "import sys, plumbline.rewards.workers\nprint(sorted({'torch', 'sympy', 'transformers', 'ray', 'math_verify', 'numpy'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.slow
def test_soak():
    before = len(processes_of(os.getpid()))
    good = [
        ("\\boxed{\\frac12}", "0.5", True),
        ("\\boxed{7}", "8", False),
        ("\\boxed{\\sin^2 x+\\cos^2 x}", "1", True),
        ("\\boxed{(1,2)}", "(2,1)", False),
    ]
    with Grader(processes=2, timeout=10.0) as grader:
        items = [
            (f"\\boxed{{{BOMBS[i // 100 % len(BOMBS)]}}}", "7", False) if i % 100 == 0 else good[i % 4]
            for i in range(20_000)
        ]
        verdicts = grader.grade_many([(response, gold) for response, gold, _ in items])
        assert len(verdicts) == 20_000
        assert [v.correct for v in verdicts] == [right for _, _, right in items]
        assert len(processes_of(os.getpid())) <= before + 2
    assert len(processes_of(os.getpid())) == before


def test_grade_many_keeps_order():
    pairs = [(f"\\boxed{{{n}}}", str(n if n % 3 else n + 1)) for n in range(200)]
    assert [v.correct for v in grade_many(pairs)] == [n % 3 != 0 for n in range(200)]
