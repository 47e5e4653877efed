"""Coverage-guided fuzzing of the verifier with atheris (not a dependency: `pip install atheris`, Linux or macOS).

    python tests/fuzz/fuzz_verifier.py [CORPUS_FOLDER] [-max_total_time=300] [-timeout=10]

Each input is an answer and a gold, parted by a NUL byte. What must hold for every one of them:

- settling in the calling process ends, within half a second of processor time, and raises nothing;
- what it hands over is text that the grading child can be asked about;
- an answer that reads as empty, or a gold that does, is never correct;
- a gold that can be read is correct against itself.

libFuzzer reports a crash for a broken property and a timeout for a hang. The comparison in the child is left out: it is
killed at its limit, whatever it does.
"""

from __future__ import annotations

import sys
import time

import atheris

with atheris.instrument_imports(include=["plumbline.rewards"]):
    from plumbline.rewards.verdict import Verdict
    from plumbline.rewards.verifier import check_gold, settle

CPU_SECONDS = 0.5
SEEDS = [
    (r"\frac{1}{2}", "0.5"), (r"x \in (-\infty, 3] \cup \{5\}", r"x\le3"), (r"1\frac12\text{ hours}", r"90\text{ min}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{cases}x&x>0\\-x&x\le0\end{cases}"), ("3:30 PM", "15:30"),
    (r"\sqrt[3]{2+\sqrt5}", r"e^{i\pi/3}"), (r"52_{\text{eight}}", "0.1\\overline{6}"), (r"x\equiv 2\pmod 5", "(C) 12"),
    (r"\log_2 3 \pm \binom{5}{2}", r"5!!"), ("twenty-one", r"\$1{,}234.50"),
]  # fmt: skip


def one_input(data: bytes) -> None:
    """Check one input."""
    answer, _, gold = data.decode("utf-8", "replace").partition("\0")
    began = time.process_time()
    found = settle(f"\\boxed{{{answer}}}", gold, True)
    spent = time.process_time() - began
    if spent > CPU_SECONDS:
        raise RuntimeError(f"{spent:.2f} s of processor time for {answer!r} against {gold!r}")
    if isinstance(found, Verdict):
        if found.correct and (not answer.strip() or not gold.strip()):
            raise RuntimeError(f"an empty side is correct: {answer!r} against {gold!r}")
    else:
        assert all(isinstance(text, str) for text in found)
    if check_gold(gold) is None and "boxed" not in gold:
        own = settle(f"\\boxed{{{gold}}}", gold, True)
        if not (isinstance(own, Verdict) and own.correct) and len(gold) < 4000:
            raise RuntimeError(f"a gold is not correct against itself: {gold!r} {own!r}")


def main() -> None:
    atheris.Setup(sys.argv, one_input)
    for answer, gold in SEEDS:
        one_input(f"{answer}\0{gold}".encode())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
