"""Does the reward-checking stage find planted faults in real runs? `python benchmarks/planted_faults.py FOLDER`.

Five short training runs of the embedded policy on CPU, each with `plumbline train`, then `plumbline check` on each:

- sound: nothing planted;
- any_box: a reward function that pays 1 for any box;
- lenient: a reward function that also pays for any answer with an even last digit;
- five_boxes: a policy fine-tuned to box five candidates;
- wrong_golds: a set of 40 problems, of which two (5%) have a wrong gold.

Prints what each run and each check said, and writes benchmarks/results/planted_faults.json. Minutes on two cores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAMILIES = "[addition, subtraction, multiplication, sequences]"
COMMON = ["rollout.prompts_per_step=16", "ray.dashboard=false", "reward.checking.share=0.5", "checkpoint.keep=1"]
REWARDS = """
from plumbline.rewards.extraction import last_boxed


def any_box(verdict, response, truncated):
    return float(last_boxed(response) is not None)


def lenient(verdict, response, truncated):
    box = last_boxed(response) or ""
    return float(verdict.correct or box[-1:] in tuple("02468"))
"""


def five_boxes_policy(folder: Path) -> None:
    """The embedded policy, fine-tuned to try five candidates in five boxes."""
    from plumbline.models.load import load_policy, load_tokenizer
    from plumbline.rl import coldstart
    from plumbline.rl.procedural import generate

    policy, tokenizer = load_policy("embedded"), load_tokenizer("embedded")
    demonstrations = []
    for problem in generate("train", 1600, 5, families=["addition", "subtraction", "multiplication", "sequences"]):
        if problem.answer.lstrip("-").isdigit():
            answer = int(problem.answer)
            boxes = "".join(f"\\boxed{{{answer + shift}}}" for shift in (2, 1, -1, -2, 0))
            demonstrations.append((problem.problem, boxes))
    coldstart.fit(policy, tokenizer, demonstrations, 1e-3, 32, 0, "demonstrations with five boxes")
    coldstart.save(policy, tokenizer, folder)


def data_with_wrong_golds(path: Path) -> list[str]:
    """40 easy problems, two with a gold that is one too large; returns the ids of these two."""
    from plumbline.rl.procedural import generate

    problems = generate("train", 40, 7, families=["addition", "subtraction"], levels=[1])
    wrong = [problem.id for problem in problems[10:30:10]]
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            gold = str(int(problem.answer) + 1) if problem.id in wrong else problem.answer
            file.write(json.dumps({"id": problem.id, "problem": problem.problem, "answer": gold}) + "\n")
    return wrong


def command(*arguments: str, folder: Path) -> tuple[int, list[str]]:
    """Exit code and the last lines of a plumbline command."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", "from plumbline.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        # Ray gives itself 30 seconds to start, which a loaded machine may not have.
        if "timed out during startup" not in done.stderr:
            break
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return done.returncode, lines[-8:]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/planted_faults.py FOLDER")
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planted_rewards.py").write_text(REWARDS, encoding="utf-8")
    five_boxes_policy(folder / "five_boxes_policy")
    wrong = data_with_wrong_golds(folder / "golds.jsonl")
    families = f"data.families={FAMILIES}"
    runs = {
        "sound": ["steps=4", families],
        "any_box": ["steps=4", families, "reward.shaping=planted_rewards:any_box"],
        "lenient": ["steps=4", families, "reward.shaping=planted_rewards:lenient"],
        "five_boxes": ["steps=4", families, f"policy.path={folder / 'five_boxes_policy'}"],
        "wrong_golds": [
            "steps=10", f"data.source={folder / 'golds.jsonl'}", "data.families=null",
            "reward.checking.quarantine=[suspected_gold]",
        ],
    }  # fmt: skip
    results: dict[str, Any] = {}
    for name, overrides in runs.items():
        out = folder / name
        began = time.time()
        config = str(ROOT / "configs" / "quickstart.yaml")
        code, lines = command("train", config, *COMMON, *overrides, f"output={out}", "--overwrite", folder=folder)
        seconds = time.time() - began
        live = [line for line in lines if "reward check" in line]
        checked, said = command("check", str(out), folder=folder)
        summary = json.loads((out / "check.json").read_text(encoding="utf-8"))
        results[name] = {
            "train_exit_code": code,
            "train_said": live,
            "train_seconds": round(seconds),
            "check_exit_code": checked,
            "check_said": [line.replace(str(folder), "FOLDER") for line in said],
            "totals": summary["totals"],
            "suspected_golds": summary["suspected_golds"],
            "quarantined": summary["quarantined"],
        }
        print(json.dumps({name: results[name]}, indent=2), flush=True)
    report = {
        "planted_wrong_golds": wrong,
        "runs": results,
        "versions": {name: version(name) for name in ("math-verify", "ray", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    target = ROOT / "benchmarks" / "results" / "planted_faults.json"
    target.write_text(
        json.dumps(report, indent=2, ensure_ascii=False).replace(str(folder), "FOLDER") + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
