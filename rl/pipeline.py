"""Select, train, evaluate: one job, one report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rl.cluster import Roles
from plumbline.rl.config import RunConfig
from plumbline.rl.evaluation import Evaluation
from plumbline.rl.files import write_whole
from plumbline.rl.heldout import answer_held_out
from plumbline.rl.loop import TrainingResult, train
from plumbline.rl.memory import MemoryWatch
from plumbline.rl.report import write_report
from plumbline.rl.sections import SamplerSection
from plumbline.rl.selecting import Selected, arms, select, whole_epochs
from plumbline.rl.tasks import TaskSet, evaluation_tasks, training_tasks
from plumbline.rl.text import Codec
from plumbline.selection.methods import arm_name


@dataclass
class PipelineResult:
    """Everything the report is made of."""

    config: RunConfig
    selected: Selected
    base: Evaluation
    arms: dict[str, Evaluation] = field(default_factory=dict)
    training: dict[str, TrainingResult] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_mb: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "base_accuracy": self.base.accuracy.as_dict(),
            **{f"{arm}_accuracy": self.arms[arm].accuracy.as_dict() for arm in arms(self.config)},
            "samples": self.samples,
            "rollouts": {name: result.rollouts for name, result in self.training.items()},
            "steps": {name: result.steps for name, result in self.training.items()},
            "training_seconds": {name: round(result.seconds, 1) for name, result in self.training.items()},
            "evaluation": {
                "source": self.config.evaluation.source,
                "temperature": self.config.evaluation.temperature,
                "completions_per_problem": self.config.evaluation.completions_per_problem,
            },
            "selection": {
                "method": self.config.selection.method,
                "variant": self.config.selection.variant,
                "rule": self.selected.chosen.rule,
                "threshold": self.selected.chosen.low,
                "scored": self.selected.scored,
                "kept": len(self.selected.kept),
                "incomplete": int(self.selected.chosen.incomplete.sum()),
                "warnings": self.selected.warnings,
            },
            "seed": self.config.seed,
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": round(self.peak_rss_mb),
        }


def run_pipeline(config: RunConfig, console: Console, *, resume: bool = False) -> PipelineResult:
    """Pre-run on the full set, selection, three arms at equal rollouts from one start, evaluation of base and arms.

    Writes summary.json, report.html, selection/, evaluation/ and a training run each for prerun and the arms into
    config.folder. With `resume`, finished stages are read back and the one that was interrupted goes on.
    """
    began = time.monotonic()
    folder = config.folder
    codec = Codec(config.policy.path, overrides=config.prompt)
    full, _ = training_tasks(config, codec)
    held_out, _ = evaluation_tasks(config, codec)
    refuse_overlap(full, held_out)
    whole_epochs(config, len(full))
    with MemoryWatch() as memory, Roles.start(config) as roles:
        base = evaluate_stage(config, "base", None, held_out, roles, console, resume)

        prerun = uniform(stage(config, "prerun", config.selection.prerun_steps))
        training = {"prerun": train_stage(prerun, roles, full, held_out, console, resume)}
        selected = select(config, prerun.folder / "history", full)
        for line in selected.lines():
            console.print(line, highlight=False, markup=False)

        result = PipelineResult(config, selected, base, training=training)
        chosen = {"full": list(full), arm_name(config.selection.method): selected.kept, "random": selected.random}
        for arm in arms(config):
            tasks = full.keep(chosen[arm])
            training[arm] = train_stage(stage(config, arm, config.steps), roles, tasks, held_out, console, resume)
            result.arms[arm] = evaluate_stage(config, arm, training[arm].policy, held_out, roles, console, resume)
            result.samples[arm] = len(tasks)
        result.peak_rss_mb = memory.peak_mb
    result.seconds = time.monotonic() - began
    (folder / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
    write_report(result, full, folder / "report.html")
    return result


def stage(config: RunConfig, name: str, steps: int) -> RunConfig:
    """The config of one training run inside the pipeline's folder."""
    return config.model_copy(update={"name": name, "output": str(config.folder / name), "steps": steps})


def uniform(config: RunConfig) -> RunConfig:
    """The config of a run that sees every sample once an epoch, whatever sampler the arms use: curves have no gaps then."""
    selection = config.selection.model_copy(update={"sampler": SamplerSection()})
    return config.model_copy(update={"selection": selection})


def train_stage(
    config: RunConfig, roles: Roles, tasks: TaskSet, held_out: TaskSet, console: Console, resume: bool
) -> TrainingResult:
    """train(), unless `resume` finds its result: then that, with the seconds it took when it ran."""
    record = config.folder / "result.json"
    if resume and record.is_file():
        tree = json.loads(record.read_text(encoding="utf-8"))
        policy = config.folder / tree["policy"]
        if tree["steps"] == config.steps and tree["samples"] == tasks.fingerprint and policy.is_dir():
            console.print(f"{config.name}: finished before, {tree['steps']} steps", highlight=False)
            return TrainingResult(policy, tree["steps"], tree["rollouts"], tree["seconds"])
    result = train(config, roles, tasks, console, held_out=held_out, resume=resume)
    tree = {
        "policy": str(result.policy.relative_to(config.folder)),
        "steps": result.steps,
        "rollouts": result.rollouts,
        "seconds": result.seconds,
        "samples": tasks.fingerprint,
    }
    write_whole(record, json.dumps(tree, indent=1) + "\n")
    return result


def refuse_overlap(training: TaskSet, held_out: TaskSet) -> None:
    """InputError if a held-out problem's text is also a training problem's."""
    texts = {training[sample_id].problem.problem.strip(): sample_id for sample_id in training}
    for sample_id in held_out:
        other = texts.get(held_out[sample_id].problem.problem.strip())
        if other is not None:
            raise InputError(
                f"held-out problem {sample_id} is also training problem {other}; evaluation would not be held out"
            )


def accuracy_table(result: PipelineResult) -> Table:
    """Base and arms with their intervals."""
    table = Table(title=f"Held-out accuracy, n = {result.base.accuracy.n}, 95% intervals")
    for heading in ("policy", "samples", "rollouts", "accuracy", "95% interval", "over base"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    base = result.base.accuracy
    table.add_row("base", "-", "-", f"{base.mean:.1%}", f"{base.low:.1%} - {base.high:.1%}", "-")
    for arm in arms(result.config):
        accuracy = result.arms[arm].accuracy
        table.add_row(
            arm,
            f"{result.samples[arm]:,}",
            f"{result.training[arm].rollouts:,}",
            f"{accuracy.mean:.1%}",
            f"{accuracy.low:.1%} - {accuracy.high:.1%}",
            f"{100 * (accuracy.mean - base.mean):+.1f} points",
        )
    return table


def evaluate_stage(
    config: RunConfig,
    name: str,
    policy: Path | None,
    held_out: TaskSet,
    roles: Roles,
    console: Console,
    resume: bool,
) -> Evaluation:
    """Evaluate a policy folder, or (None) the policy that the run starts from."""
    label = str(policy.relative_to(config.folder)) if policy else config.policy.path

    def begin() -> None:
        roles.begin_evaluation(config, str(policy) if policy else None)

    result = answer_held_out(config, name, held_out, roles, label, finished=resume, begin=begin)
    console.print(f"{name}: {result.accuracy} of {result.accuracy.n} held-out problems", highlight=False)
    return result
