"""How far plumbline's verdicts agree with those of other evaluation programs on the same completions.

    python benchmarks/evaluation_agreement.py runs/evaluate-x/math500.jsonl tests/rewards/labelled/*.jsonl \
        --limr LIMR/eval --output agreement.json

Reads completions as `plumbline evaluate` keeps them (response, gold, correct), or labelled pairs (answer, gold,
correct), whose label is plumbline's verdict too, as tests/rewards/test_labelled.py checks. Scores them with lm-eval's
AIME and Minerva tasks (where lm-eval with its `math` extra is installed) and with LIMR's evaluation script (its folder
`eval`). This program needs none of plumbline, so it runs in lm-eval's own environment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

SECONDS = 10
SHOWN = 5
Scorer = Callable[[str, str, str], bool]


class TooLong(Exception):
    pass


@contextmanager
def limit(seconds: int):
    def stop(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def lm_eval_scorers() -> dict[str, Scorer]:
    """Each takes (response, answer, gold). Minerva's exact match wants its own closing sentence, which it gets."""
    aime = importlib.import_module("lm_eval.tasks.aime.utils")
    minerva = importlib.import_module("lm_eval.tasks.minerva_math.utils")

    def closing(response: str, answer: str) -> str:
        return f"{response}\nFinal Answer: The final answer is ${answer}$. I hope it is correct."

    def exact(response: str, answer: str, gold: str) -> bool:
        found = minerva.normalize_final_answer(minerva.get_unnormalized_answer(closing(response, answer)))
        return bool(minerva.is_equiv(found, minerva.normalize_final_answer(gold)))

    def verified(response: str, answer: str, gold: str) -> bool:
        return bool(minerva.verify(minerva.parse(f"${gold}$"), minerva.parse(response)))

    def string(response: str, answer: str, gold: str) -> bool:
        return bool(aime.process_results({"answer": gold}, [response])["exact_match"])

    version = metadata.version("lm_eval")
    return {
        f"lm-eval {version} minerva_math exact_match": exact,
        f"lm-eval {version} minerva_math math_verify": verified,
        f"lm-eval {version} aime exact_match": string,
    }


def limr_scorer(folder: Path) -> dict[str, Scorer]:
    sys.path.insert(0, str(folder))
    equal = importlib.import_module("utils.equal")

    def score(response: str, answer: str, gold: str) -> bool:
        return bool(equal.math_equal(equal.normalize_final_answer(answer), equal.normalize_final_answer(gold)))

    return {"LIMR eval.py": score}


def read(paths: list[Path]) -> list[dict]:
    rows = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                row = json.loads(line)
                row.setdefault("response", f"So the answer is $\\boxed{{{row['answer']}}}$.")
                if row["answer"] is not None:
                    rows.append(row | {"file": path.name})
    return rows


def judge(score: Scorer, row: dict) -> bool | None:
    """None: the scorer failed or took too long."""
    try:
        with limit(SECONDS):
            return score(row["response"], row["answer"], row["gold"])
    except TooLong:
        return None
    except Exception:  # whatever another program raises on an answer is its verdict: none
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("completions", nargs="+", type=Path)
    parser.add_argument("--limr", type=Path, help="the folder `eval` of LIMR's repository")
    parser.add_argument("--no-lm-eval", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.completions)
    scorers: dict[str, Scorer] = {} if arguments.no_lm_eval else lm_eval_scorers()
    if arguments.limr:
        scorers |= limr_scorer(arguments.limr)
    ours = sum(row["correct"] for row in rows)
    report: dict[str, object] = {"answers": len(rows), "plumbline_right": ours, "scorers": {}}
    print(f"{len(rows)} answers, {ours} right for plumbline ({ours / len(rows):.1%})")
    for name, score in scorers.items():
        verdicts = [judge(score, row) for row in rows]
        only_ours = [row for row, verdict in zip(rows, verdicts, strict=True) if row["correct"] and verdict is False]
        only_theirs = [row for row, verdict in zip(rows, verdicts, strict=True) if not row["correct"] and verdict]
        failed = sum(verdict is None for verdict in verdicts)
        right = sum(verdict is True for verdict in verdicts)
        agree = (len(rows) - failed - len(only_ours) - len(only_theirs)) / len(rows)
        print(
            f"{name}: {right} right ({right / len(rows):.1%}); agrees on {agree:.1%}; "
            f"right for plumbline alone {len(only_ours)}, for it alone {len(only_theirs)}, failed {failed}"
        )
        for label, group in (("plumbline alone", only_ours), ("it alone", only_theirs)):
            for row in group[:: max(1, len(group) // SHOWN)][:SHOWN]:
                print(f"    {label}: {row['answer']!r} for {row['gold']!r} ({row['file']})")
        report["scorers"][name] = {  # type: ignore[index]
            "right": right,
            "agreement": agree,
            "plumbline_alone": len(only_ours),
            "it_alone": len(only_theirs),
            "failed": failed,
        }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
