"""Selection methods on a real policy: the arms of a pipeline over several seeds, at equal rollouts and at equal total
rollouts, with intervals.

    python benchmarks/selection_runs.py configs/quickstart.yaml --seeds 5
    python benchmarks/selection_runs.py configs/quickstart.yaml --seeds 5 --methods full,random,lim steps=60

A seed is a world of its own: other training problems, other held-out problems, other draws. In each, one run on the
full set is the pre-run of every method and the full arm at once (a run's first steps are the same however long it goes
on). Every method selects from its history; random, linear, variance and p(1-p) keep as many samples as lim, the
pass-rate band what falls into it.

An arm is evaluated after `steps` steps (equal rollouts), and again when it has spent what the dearest method spent in
all, `steps` and the pre-run, its own cost of selecting counted (equal total rollouts): a pre-run for methods that need
curves, one epoch for the pass-rate band, nothing for full and random.

What is finished is kept in results.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import t as student

from plumbline.errors import InputError
from plumbline.rl.config import RunConfig, load_config
from plumbline.rl.files import write_whole
from plumbline.selection.methods import METHODS, arm_name, method_named

COUNTED = ("random", "linear", "variance", "p(1-p)")
DEFAULT = "full,random,linear,pass_rate,variance,lim"
EQUAL, TOTAL = "equal rollouts", "equal total rollouts"


@dataclass(frozen=True)
class Row:
    """One evaluation: of an arm of a seed after so many steps."""

    seed: int
    arm: str
    steps: int
    samples: int
    spent: int
    accuracy: float
    problems: int


class Results:
    """The rows there are, on disk after each.

    Raises InputError for a file that another config wrote.
    """

    def __init__(self, folder: Path, settings: str) -> None:
        self.path = folder / "results.jsonl"
        self.rows: dict[tuple[int, str, int], Row] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        # The last line is empty, or was cut off.
        for line in lines[:-1]:
            row = json.loads(line)
            if row.pop("settings") != settings:
                raise InputError(f"{self.path} holds results of another config; give another --folder")
            self._keep(Row(**row))
        self.settings = settings
        with self.path.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines[:-1])

    def add(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row.__dict__, "settings": self.settings}) + "\n")
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self.rows[row.seed, row.arm, row.steps] = row


def points(config: RunConfig, arm: str, samples: int) -> dict[str, int]:
    """Steps after which an arm is evaluated, by way of counting; `samples` is the size of the full set."""
    prerun, steps = config.selection.prerun_steps, config.steps
    epoch = -(-samples // config.rollout.prompts_per_step)
    price = 0 if arm in ("full", "random") else epoch if arm == "pass_rate" else prerun
    return {EQUAL: steps, TOTAL: steps + prerun - price}


def of_seed(config: RunConfig, seed: int, folder: Path) -> RunConfig:
    """The config of one world."""
    changes = {
        "seed": seed,
        "output": str(folder / f"seed-{seed}"),
        "data": config.data.model_copy(update={"seed": seed}),
        "evaluation": config.evaluation.model_copy(update={"seed": seed}),
    }
    return config.model_copy(update=changes)


def of_method(config: RunConfig, method: str, count: int | None) -> RunConfig:
    """The config that selects by a method; its folder gets the selection's report."""
    own = method == config.selection.method
    rule = (
        {} if own else {"threshold": None, "high": None, "share": None, "count": count if method in COUNTED else None}
    )
    selection = config.selection.model_copy(update={"method": method, **rule})
    return config.model_copy(update={"selection": selection, "output": str(config.folder / f"by-{method}")})


def run_seed(config: RunConfig, methods: list[str], results: Results, roles: Any, console: Console) -> list[str]:
    """All arms of one seed. Returns what had to be left out, in words."""
    from plumbline.rl.loop import train
    from plumbline.rl.pipeline import evaluate_stage, refuse_overlap, stage
    from plumbline.rl.tasks import TaskSet, evaluation_tasks, training_tasks
    from plumbline.rl.text import Codec

    codec = Codec(config.policy.path, overrides=config.prompt)
    full, _ = training_tasks(config, codec)
    held_out, _ = evaluation_tasks(config, codec)
    refuse_overlap(full, held_out)

    def measure(arm: str, steps: int, tasks: TaskSet, policy: Path | None) -> None:
        spent = steps * config.rollout.prompts_per_step * config.rollout.completions_per_prompt
        found = evaluate_stage(config, f"{arm_name(arm)}-{steps}", policy, held_out, roles, console, True)
        results.add(Row(config.seed, arm, steps, len(tasks), spent, found.accuracy.mean, found.accuracy.n))

    def advance(arm: str, tasks: TaskSet, stops: set[int]) -> None:
        for steps in sorted(stops):
            if (config.seed, arm, steps) not in results.rows:
                trained = train(stage(config, arm_name(arm), steps), roles, tasks, console, resume=True)
                measure(arm, steps, tasks, trained.policy)

    if (config.seed, "base", 0) not in results.rows:
        measure("base", 0, full, None)
    prerun = config.selection.prerun_steps
    advance("full", full, {prerun} | {steps for steps in points(config, "full", len(full)).values() if steps < prerun})
    chosen = choose(config, [method for method in methods if method != "full"], full, console)
    for arm in methods:
        ids = list(full) if arm == "full" else chosen[arm]
        if isinstance(ids, list):
            advance(arm, full.keep(ids), set(points(config, arm, len(full)).values()))
    return [f"seed {config.seed}, {arm}: {ids}" for arm, ids in chosen.items() if isinstance(ids, str)]


def choose(config: RunConfig, methods: list[str], full: Any, console: Console) -> dict[str, list[str] | str]:
    """Method -> ids, or why there are none; kept on disk, because the history grows on after the pre-run."""
    from plumbline.rl.selecting import select

    path = config.folder / "chosen.json"
    chosen: dict[str, list[str] | str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    own = config.selection.method
    before = len(chosen)
    # The configured method first: it says how many the others keep.
    for method in sorted({*methods, own}, key=lambda name: name != own):
        if method in chosen:
            continue
        count = len(chosen[own]) if own in chosen else None
        try:
            selected = select(of_method(config, method, count), config.folder / "full" / "history", full)
        except InputError as error:
            if method == own:
                raise
            chosen[method] = str(error)
            console.print(f"seed {config.seed}: {method} is left out: {error}", highlight=False, markup=False)
            continue
        chosen[method] = selected.kept
        for line in selected.lines():
            console.print(f"seed {config.seed}: {line}", highlight=False, markup=False)
    if len(chosen) > before:
        write_whole(path, json.dumps(chosen))
    return chosen


def interval(values: list[float], form: str) -> str:
    """Mean and 95% interval over seeds by Student's t; seeds are few, and a bootstrap of few values is too narrow."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:{form}}"
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


def table(config: RunConfig, methods: list[str], rows: list[Row], samples: int) -> str:
    """Markdown: accuracy in percent and the paired difference to `full`, at both ways of counting."""
    found = {(row.seed, row.arm, row.steps): row for row in rows}
    seeds = sorted({row.seed for row in rows})
    lines = [
        "| arm | seeds | samples | steps | equal rollouts | over full | steps | equal total rollouts | over full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in ["base", *methods]:
        due = {EQUAL: 0, TOTAL: 0} if arm == "base" else points(config, arm, samples)
        reference = points(config, "full", samples)
        have = [s for s in seeds if all((s, arm, steps) in found for steps in due.values())]
        if not have:
            lines.append(f"| {arm} | 0 |" + " - |" * 7)
            continue
        kept = np.mean([found[s, arm, due[EQUAL]].samples for s in have])
        cells = [arm, str(len(have)), "-" if arm == "base" else f"{kept:.0f}"]
        for way, steps in due.items():
            cells += [str(steps), interval([100 * found[s, arm, steps].accuracy for s in have], ".1f")]
            paired = [s for s in have if (s, "full", reference[way]) in found]
            gaps = [100 * (found[s, arm, steps].accuracy - found[s, "full", reference[way]].accuracy) for s in paired]
            cells.append("-" if arm == "full" or not gaps else interval(gaps, "+.1f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, print the table; with --output, also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of a pipeline; see configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--seeds", type=int, default=5, help="worlds, numbered from 0")
    parser.add_argument("--methods", default=DEFAULT, help=f"comma list: full, {', '.join(METHODS)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/selection-runs"), help="of everything it writes")
    parser.add_argument("--output", type=Path, help="write the table there as Markdown")
    options = parser.parse_intermixed_args(arguments)
    try:
        text = run(options)
    except (InputError, FileNotFoundError) as error:
        parser.error(str(error))
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"# Selection methods on a real policy\n\n{text}\n", encoding="utf-8")


def run(options: argparse.Namespace) -> str:
    """The table with its note. InputError for a config or methods that do not fit."""
    config = load_config(options.config, options.overrides)
    methods = list(dict.fromkeys(name.strip() for name in options.methods.split(",") if name.strip()))
    try:
        for name in methods:
            if name != "full":
                method_named(name)
    except ValueError as error:
        raise InputError(f"--methods: {error}") from None
    if config.learner.schedule != "constant" or config.selection.sampler.name != "uniform":
        raise InputError(
            "arms are evaluated on the way and differ in their samples alone: this needs learner.schedule=constant and "
            "selection.sampler.name=uniform"
        )
    if options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    tree = config.model_dump(mode="json", exclude={"name", "output", "ray"})
    settings = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
    results = Results(options.folder, settings)

    from plumbline.rl.cluster import Roles

    console, missing = Console(emoji=False), []
    with Roles.start(config) as roles:
        for seed in range(options.seeds):
            missing += run_seed(of_seed(config, seed, options.folder), methods, results, roles, console)
    rows = [row for row in results.rows.values() if row.seed < options.seeds]
    samples = next(row.samples for row in rows if row.arm == "full")
    note = (
        f"Held-out accuracy in percent at temperature {config.evaluation.temperature:g}, mean and 95% interval over "
        f"seeds (Student's t), each seed with its own {samples:,} training and {rows[0].problems:,} held-out problems; "
        f"{config.rollout.prompts_per_step} x {config.rollout.completions_per_prompt} rollouts a step. Equal total: "
        f"{config.steps} + {config.selection.prerun_steps} steps in all, less what the method spent to select. "
        f"Policy {config.policy.path}, {options.config.name}{''.join(' ' + o for o in options.overrides)}; "
        f"Python {platform.python_version()}, {versions()}."
    )
    left_out = "".join(f"\n\nLeft out: {reason}." for reason in missing)
    return f"{table(config, methods, rows, samples)}\n\n{note}{left_out}"


def versions() -> str:
    """Of what computes."""
    import torch

    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", CPU"
    return f"torch {torch.__version__}{card}"


if __name__ == "__main__":
    main()
