"""How far plumbline's verdicts agree with those of other evaluation programs on the same completions.

    python benchmarks/evaluation_agreement.py tora-70b-v1.0.jsonl --grade graded.jsonl
    python benchmarks/evaluation_agreement.py graded.jsonl --limr LIMR/eval --output agreement.json
    python benchmarks/evaluation_agreement.py runs/evaluate-x/math500.jsonl --programs lighteval

Reads completions as `plumbline evaluate` keeps them (response, gold, correct), outputs as ToRA published them (with
code and gt), or labelled pairs (answer, gold, correct), whose label is plumbline's verdict too, as a test of them
checks. `--grade` lets plumbline grade them and writes them as `plumbline evaluate` would. Without it nothing of
plumbline is needed, so that the program runs in each other program's own environment: with lm-eval's `math` extra, with
lighteval's, and with what LIMR's evaluation imports (SymPy, antlr4, regex, jsonlines). --output has every disagreement.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

SECONDS = 10
SHOWN = 5
# Characters of a completion's end kept with a disagreement.
TAIL = 300
# (response, plumbline's extracted answer or None, gold) -> right or wrong.
Scorer = Callable[[str, "str | None", str], bool]


class TooLong(Exception):
    pass


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def lm_eval_scorers() -> dict[str, Scorer]:
    """The scoring of lm-eval's tasks gsm8k (flexible-extract), minerva_math and aime, by its own functions."""
    import yaml

    aime = importlib.import_module("lm_eval.tasks.aime.utils")
    minerva = importlib.import_module("lm_eval.tasks.minerva_math.utils")
    regex = importlib.import_module("lm_eval.filters.extraction").RegexFilter
    exact_match = importlib.import_module("lm_eval.api.metrics").exact_match_fn
    folder = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent
    task = yaml.safe_load((folder / "gsm8k" / "gsm8k.yaml").read_text(encoding="utf-8"))
    (flexible,) = (entry for entry in task["filter_list"] if entry["name"] == "flexible-extract")
    (find,) = (step for step in flexible["filter"] if step["function"] == "regex")
    extract = regex(**{key: value for key, value in find.items() if key != "function"})
    (metric,) = (entry for entry in task["metric_list"] if entry["metric"] == "exact_match")
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    def gsm8k(response: str, answer: str | None, gold: str) -> bool:
        ((found,),) = extract.apply([[response]], [{}])
        return bool(exact_match(predictions=[found], references=[gold], **options)["exact_match"])

    def exact(response: str, answer: str | None, gold: str) -> bool:
        # Minerva's extraction wants its own closing sentence, which the prompt of its task teaches; it gets it.
        closed = f"{response}\nFinal Answer: The final answer is ${answer or ''}$. I hope it is correct."
        found = minerva.normalize_final_answer(minerva.get_unnormalized_answer(closed))
        return bool(minerva.is_equiv(found, minerva.normalize_final_answer(gold)))

    def verified(response: str, answer: str | None, gold: str) -> bool:
        return bool(minerva.verify(minerva.parse(f"${gold}$"), minerva.parse(response)))

    def string(response: str, answer: str | None, gold: str) -> bool:
        return bool(aime.process_results({"answer": gold}, [response])["exact_match"])

    version = metadata.version("lm_eval")
    return {
        f"lm-eval {version} gsm8k flexible-extract": gsm8k,
        f"lm-eval {version} minerva_math exact_match": exact,
        f"lm-eval {version} minerva_math math_verify": verified,
        f"lm-eval {version} aime exact_match": string,
    }


def lighteval_scorers() -> dict[str, Scorer]:
    """The metrics of lighteval's tasks gsm8k (expr_gold_metric) and math_500 (pass_at_k_math, with k = n = 1)."""
    metrics = importlib.import_module("lighteval.metrics.metrics").Metrics
    document = importlib.import_module("lighteval.tasks.requests").Doc
    response_type = importlib.import_module("lighteval.models.model_output").ModelResponse
    expression = metrics.expr_gold_metric.value.sample_level_fn
    latex = metrics.pass_at_k_math(sample_params={"k": 1, "n": 1}).sample_level_fn

    def judged(metric: Any, response: str, gold: str) -> bool:
        doc = document(query="", choices=[gold], gold_index=0)
        return float(metric.compute(doc=doc, model_response=response_type(text=[response]))) == 1.0

    def gsm8k(response: str, answer: str | None, gold: str) -> bool:
        return judged(expression, response, f" {gold}")

    def math(response: str, answer: str | None, gold: str) -> bool:
        # Its golds are the solutions of MATH, whose answer stands in a box.
        return judged(latex, response, f"ANSWER: $\\boxed{{{gold}}}$")

    version = metadata.version("lighteval")
    return {f"lighteval {version} gsm8k": gsm8k, f"lighteval {version} math_500": math}


def limr_scorer(folder: Path) -> dict[str, Scorer]:
    """LIMR's own extraction and comparison: math_eval of its eval.py, without the vLLM that this file imports."""
    sys.path.insert(0, str(folder))
    equal = importlib.import_module("utils.equal")
    tree = ast.parse((folder / "eval.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "math_eval"]
    space: dict[str, Any] = {
        "re": re,
        "math_equal": equal.math_equal,
        "normalize_final_answer": equal.normalize_final_answer,
    }
    exec(compile(tree, str(folder / "eval.py"), "exec"), space)

    def score(response: str, answer: str | None, gold: str) -> bool:
        return space["math_eval"](response, gold) is True

    return {"LIMR eval.py": score}


def read(paths: list[Path]) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            row = json.loads(line)
            if "code" in row and "gt" in row:
                row = {"sample_id": str(row["idx"]), "response": row["code"][0], "gold": row["gt"]}
            row.setdefault("response", f"So the answer is $\\boxed{{{row.get('answer')}}}$.")
            rows.append(row | {"file": path.name})
    return rows


def grade(rows: list[dict[str, Any]], output: Path) -> None:
    """Give every row plumbline's verdict and keep them."""
    from plumbline.rewards.verifier import grade_many

    verdicts = grade_many([(row["response"], row["gold"]) for row in rows], timeout=SECONDS)
    with output.open("w", encoding="utf-8") as file:
        for row, verdict in zip(rows, verdicts, strict=True):
            row |= {"correct": verdict.correct, "reason": verdict.reason, "answer": verdict.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    right = sum(verdict.correct for verdict in verdicts)
    print(f"{len(rows)} completions, {right} right ({right / len(rows):.1%}): {output}")


def judge(score: Scorer, row: dict[str, Any]) -> bool | None:
    """None: the scorer failed or took too long."""
    try:
        with limit(SECONDS):
            return score(row["response"], row["answer"], row["gold"])
    except TooLong:
        return None
    except Exception:  # whatever another program raises on an answer is its verdict: none
        return None


def compare(name: str, score: Scorer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement of one scorer with the rows' verdicts, printed and returned with every disagreement."""
    verdicts = [judge(score, row) for row in rows]
    found: dict[str, Any] = {
        "right": sum(verdict is True for verdict in verdicts),
        "failed": sum(verdict is None for verdict in verdicts),
        "plumbline_alone": [],
        "it_alone": [],
    }
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict is not None and verdict != row["correct"]:
            kept = {key: row.get(key) for key in ("file", "sample_id", "answer", "gold", "reason")}
            kept["end"] = row["response"][-TAIL:]
            found["plumbline_alone" if row["correct"] else "it_alone"].append(kept)
    apart = len(found["plumbline_alone"]) + len(found["it_alone"])
    found["agreement"] = (len(rows) - found["failed"] - apart) / len(rows)
    print(
        f"{name}: {found['right']} right ({found['right'] / len(rows):.1%}); agrees on {found['agreement']:.2%}; "
        f"right for plumbline alone {len(found['plumbline_alone'])}, for it alone {len(found['it_alone'])}, "
        f"failed {found['failed']}",
        flush=True,
    )
    for label in ("plumbline_alone", "it_alone"):
        for row in found[label][:SHOWN]:
            print(f"    {label}: {row['answer']!r} for {row['gold']!r} ({row['file']} {row['sample_id']})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("completions", nargs="+", type=Path)
    parser.add_argument(
        "--grade", type=Path, metavar="OUTPUT", help="grade with plumbline into this file, compare nothing"
    )
    parser.add_argument("--limr", type=Path, help="the folder `eval` of LIMR's repository")
    parser.add_argument("--programs", default="lm-eval", help="comma list of lm-eval, lighteval; none for neither")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.completions)
    if arguments.grade:
        grade(rows, arguments.grade)
        return
    programs = arguments.programs.split(",")
    scorers: dict[str, Scorer] = limr_scorer(arguments.limr) if arguments.limr else {}
    scorers |= lm_eval_scorers() if "lm-eval" in programs else {}
    scorers |= lighteval_scorers() if "lighteval" in programs else {}
    ours = sum(row["correct"] for row in rows)
    print(f"{len(rows)} completions, {ours} right for plumbline ({ours / len(rows):.1%})")
    report: dict[str, Any] = {"completions": len(rows), "plumbline_right": ours, "scorers": {}}
    for name, score in scorers.items():
        report["scorers"][name] = compare(name, score, rows)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
