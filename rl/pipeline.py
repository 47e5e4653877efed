"""Select, train, evaluate: one job, one report."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rl.batch import Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.config import RunConfig
from plumbline.rl.evaluation import Evaluation, evaluate, finished_evaluation
from plumbline.rl.loop import TrainingResult, train
from plumbline.rl.memory import MemoryWatch
from plumbline.rl.report import write_report
from plumbline.rl.tasks import TaskSet, evaluation_tasks, training_tasks
from plumbline.rl.text import Codec
from plumbline.selection import lim
from plumbline.selection.history import curves

ARMS = ("full", "random", "lim")


@dataclass
class Selected:
    """What LIM made of the pre-run's history.

    Attributes:
        sample_ids, curves [N, K], scores [N], average [K]: as in selection/lim.py, over samples with a score.
        kept: ids at or over the threshold.
        random: as many ids drawn by the run's seed.
        incomplete: samples without a complete curve; they have no score and are dropped.
    """

    sample_ids: list[str]
    curves: np.ndarray
    scores: np.ndarray
    average: np.ndarray
    kept: list[str]
    random: list[str]
    incomplete: int


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
            **{f"{arm}_accuracy": self.arms[arm].accuracy.as_dict() for arm in ARMS},
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
                "threshold": self.config.selection.threshold,
                "scored": len(self.selected.sample_ids),
                "kept": len(self.selected.kept),
                "incomplete": self.selected.incomplete,
            },
            "seed": self.config.seed,
            "seconds": round(self.seconds, 1),
            "peak_rss_mb": round(self.peak_rss_mb),
        }


def run_pipeline(config: RunConfig, console: Console, *, resume: bool = False) -> PipelineResult:
    """Pre-run on the full set, LIM, three arms at equal rollouts from one start, evaluation of base and arms.

    Writes summary.json, report.html, selection/, evaluation/ and a training run each for prerun and the arms into
    config.folder. With `resume`, finished stages are read back and the one that was interrupted goes on.
    """
    began = time.monotonic()
    folder = config.folder
    codec = Codec(config.policy.path, overrides=config.prompt)
    full, _ = training_tasks(config, codec)
    held_out, _ = evaluation_tasks(config, codec)
    refuse_overlap(full, held_out)
    with MemoryWatch() as memory, Roles.start(config) as roles:
        base = _evaluate(config, "base", None, held_out, roles, console, resume)

        prerun = stage(config, "prerun", config.selection.prerun_steps)
        training = {"prerun": train_stage(prerun, roles, full, console, resume)}
        selected = select(config, prerun.folder / "history", full)
        console.print(
            f"LIM keeps {len(selected.kept)} of {len(selected.sample_ids)} samples at threshold {config.selection.threshold:g}; "
            f"the random arm draws as many"
        )

        result = PipelineResult(config, selected, base, training=training)
        chosen = {"full": list(full), "random": selected.random, "lim": selected.kept}
        for arm in ARMS:
            tasks = full.keep(chosen[arm])
            training[arm] = train_stage(stage(config, arm, config.steps), roles, tasks, console, resume)
            result.arms[arm] = _evaluate(config, arm, training[arm].policy, held_out, roles, console, resume)
            result.samples[arm] = len(tasks)
        result.peak_rss_mb = memory.peak_mb
    result.seconds = time.monotonic() - began
    (folder / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
    write_report(result, full, folder / "report.html")
    return result


def stage(config: RunConfig, name: str, steps: int) -> RunConfig:
    """The config of one training run inside the pipeline's folder."""
    return config.model_copy(update={"name": name, "output": str(config.folder / name), "steps": steps})


def train_stage(config: RunConfig, roles: Roles, tasks: TaskSet, console: Console, resume: bool) -> TrainingResult:
    """train(), unless `resume` finds its result: then that, with the seconds it took when it ran."""
    record = config.folder / "result.json"
    if resume and record.is_file():
        tree = json.loads(record.read_text(encoding="utf-8"))
        policy = config.folder / tree["policy"]
        if tree["steps"] == config.steps and tree["samples"] == tasks.fingerprint and policy.is_dir():
            console.print(f"{config.name}: finished before, {tree['steps']} steps", highlight=False)
            return TrainingResult(policy, tree["steps"], tree["rollouts"], tree["seconds"])
    result = train(config, roles, tasks, console, resume=resume)
    tree = {
        "policy": str(result.policy.relative_to(config.folder)),
        "steps": result.steps,
        "rollouts": result.rollouts,
        "seconds": result.seconds,
        "samples": tasks.fingerprint,
    }
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record)
    return result


def select(config: RunConfig, history: Path, full: TaskSet) -> Selected:
    """Score the recorded history and write selection/: kept and random ids, one a line, and all scores as JSON.

    Raises InputError when nothing reaches the threshold, or the history has no complete curve.
    """
    settings = config.selection
    value = "correct" if settings.variant == "limr" else "reward"
    sample_ids, raw = curves(history, value=value)
    filled = lim.fill_gaps(raw, mode=settings.variant)
    usable = ~np.isnan(filled).any(1) if settings.variant == "limr" else ~np.isnan(filled).all(1)
    if not usable.any():
        raise InputError(
            f"no sample has a complete reward curve after {settings.prerun_steps} steps; raise selection.prerun_steps so that "
            f"every one of the {len(full)} samples is seen in every epoch"
        )
    sample_ids = [sample_id for sample_id, use in zip(sample_ids, usable, strict=True) if use]
    scores, average = lim.lim_scores(filled[usable])
    keep = lim.select(scores, threshold=settings.threshold)
    kept = [sample_id for sample_id, chosen in zip(sample_ids, keep, strict=True) if chosen]
    if not kept:
        raise InputError(
            f"selection.threshold = {settings.threshold:g} selects none of {len(scores)} scored samples (highest score {np.nanmax(scores):.2f}); lower it"
        )
    rng = np.random.default_rng(config.seed)
    random = sorted(rng.choice(np.array(sorted(full)), size=len(kept), replace=False).tolist())
    target = config.folder / "selection"
    target.mkdir(parents=True, exist_ok=True)
    (target / "lim_ids.txt").write_text("".join(f"{sample_id}\n" for sample_id in kept), encoding="utf-8")
    (target / "random_ids.txt").write_text("".join(f"{sample_id}\n" for sample_id in random), encoding="utf-8")
    table = {
        sample_id: None if np.isnan(score) else float(score)
        for sample_id, score in zip(sample_ids, scores, strict=True)
    }
    (target / "scores.json").write_text(
        json.dumps({"average": average.tolist(), "scores": table}, indent=1), encoding="utf-8"
    )
    return Selected(sample_ids, filled[usable], scores, average, kept, random, int((~usable).sum()))


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
    for arm in ARMS:
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


def _evaluate(
    config: RunConfig,
    name: str,
    policy: Path | None,
    held_out: TaskSet,
    roles: Roles,
    console: Console,
    resume: bool,
) -> Evaluation:
    """Evaluate a policy folder, or (None) the policy that the run starts from."""
    settings = config.evaluation
    sampling = Sampling(
        settings.max_new_tokens or config.rollout.max_new_tokens,
        settings.temperature,
        settings.top_p,
        seed=config.seed + 1,
    )
    output, completions = config.folder / "evaluation", settings.completions_per_problem
    label = str(policy.relative_to(config.folder)) if policy else config.policy.path
    result = finished_evaluation(name, held_out, sampling, completions, output, label) if resume else None
    if result is None:
        roles.begin_evaluation(config, str(policy) if policy else None)
        result = evaluate(name, held_out, roles, sampling, completions, output, policy=label)
    console.print(f"{name}: {result.accuracy} of {result.accuracy.n} held-out problems", highlight=False)
    return result
