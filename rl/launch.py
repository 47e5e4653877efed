"""From a command to a running job: check everything, say what will happen, start, report."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rl.batch import Sampling
from plumbline.rl.config import RunConfig, parse_config
from plumbline.rl.grading import load_shaping
from plumbline.rl.output import mark_run, prepare_output
from plumbline.rl.plan import TRAINING_RUNS_OF_A_PIPELINE, make_plan, print_plan
from plumbline.rl.tasks import TaskSet, evaluation_tasks, training_tasks


def launch_training(config: RunConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> None:
    """`plumbline train`."""
    from plumbline.rl.text import Codec

    codec = Codec(config.policy.path, overrides=config.prompt)
    tasks, report = training_tasks(config, codec)
    for line in report.lines():
        console.print(line, highlight=False)
    load_shaping(config.reward.shaping)
    plan = make_plan(config)
    prepare_output(config.folder, plan.disk, resume=resume, overwrite=overwrite)
    mark_run(config, "train")
    print_plan(config, plan, len(tasks), console, title=f"plumbline train: {config.name}")

    from plumbline.rl.cluster import Roles
    from plumbline.rl.loop import train

    console.print("starting Ray and the workers …")
    with Roles.start(config) as roles:
        result = train(config, roles, tasks, console, resume=resume)
    console.print(
        f"done: {result.steps} steps, {result.rollouts:,} rollouts in {result.seconds:.0f} s; policy in {result.policy}",
        highlight=False,
    )


def launch_pipeline(config: RunConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> None:
    """`plumbline run`."""
    from plumbline.rl.text import Codec

    codec = Codec(config.policy.path, overrides=config.prompt)
    tasks, report = training_tasks(config, codec)
    evaluation_tasks(config, codec)
    for line in report.lines():
        console.print(line, highlight=False)
    load_shaping(config.reward.shaping)
    plan = make_plan(config, training_runs=TRAINING_RUNS_OF_A_PIPELINE)
    prepare_output(config.folder, plan.disk, resume=resume, overwrite=overwrite)
    mark_run(config, "run")
    print_plan(
        config,
        plan,
        len(tasks),
        console,
        title=f"plumbline run: {config.name} (each of the three arms; a pre-run of {config.selection.prerun_steps} steps comes first)",
    )

    from plumbline.rl.pipeline import accuracy_table, run_pipeline

    console.print("starting Ray and the workers …")
    result = run_pipeline(config, console, resume=resume)
    console.print(accuracy_table(result))
    console.print(
        f"{result.seconds:.0f} s, peak memory {result.peak_rss_mb:,.0f} MB; report: {config.folder / 'report.html'}, "
        f"figures: {config.folder / 'summary.json'}",
        highlight=False,
    )


def launch_evaluation(
    model: str,
    benchmarks: list[str],
    console: Console,
    *,
    limit: int | None,
    completions: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    slots: int,
    workers: int,
    attention: str | None,
    device: str,
    seed: int,
    output: Path | None,
    overwrite: bool,
) -> None:
    """`plumbline evaluate`."""
    from plumbline.rl.text import Codec

    if not benchmarks:
        raise InputError("--benchmarks names nothing; for example aime24,math500")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    tree = {
        "name": f"evaluate-{name}",
        "output": str(output) if output else None,
        "seed": seed,
        "policy": {"path": model, "attention": attention, "device": device},
        "rollout": {"workers": workers, "slots": slots, "max_new_tokens": max_new_tokens},
    }
    config = parse_config(tree, where="plumbline evaluate")
    codec = Codec(model, overrides=config.prompt)
    sets: dict[str, TaskSet] = {}
    for benchmark in benchmarks:
        section = config.evaluation.model_copy(update={"source": benchmark, "limit": limit})
        tasks, report = evaluation_tasks(config.model_copy(update={"evaluation": section}), codec)
        for line in report.lines():
            console.print(line, highlight=False)
        sets[benchmark] = tasks
    plan = make_plan(config)
    prepare_output(config.folder, plan.parameters, resume=False, overwrite=overwrite)
    mark_run(config, "evaluate")

    from plumbline.rl.cluster import Roles
    from plumbline.rl.evaluation import Evaluation, evaluate

    problems = sum(len(tasks) for tasks in sets.values())
    console.print(
        f"{model}: {plan.parameters / 1e6:.1f} M parameters; {problems} problems x {completions}, at most {max_new_tokens} tokens each; output {config.folder}",
        highlight=False,
    )
    results: list[Evaluation] = []
    with Roles.start(config, learner=False) as roles:
        roles.begin_evaluation(config, None)
        for benchmark, tasks in sets.items():
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
                bar = progress.add_task(benchmark, total=len(tasks))
                results.append(
                    evaluate(
                        re.sub(r"[^A-Za-z0-9._-]+", "-", benchmark),
                        tasks,
                        roles,
                        Sampling(max_new_tokens, temperature, top_p, seed),
                        completions,
                        config.folder,
                        progress=lambda done, _all, bar=bar, progress=progress: progress.update(bar, completed=done),  # type: ignore[misc]
                    )
                )
    table = Table(title=f"{model}: accuracy with 95% intervals over problems")
    for heading in ("benchmark", "problems", "accuracy", "95% interval", "tokens", "truncated", "no answer", "seconds"):
        table.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for benchmark, result in zip(sets, results, strict=True):
        accuracy = result.accuracy
        table.add_row(
            benchmark,
            str(accuracy.n),
            f"{accuracy.mean:.1%}",
            f"{accuracy.low:.1%} - {accuracy.high:.1%}",
            f"{result.tokens:.0f}",
            f"{result.truncated:.0%}",
            f"{result.no_answer:.0%}",
            f"{result.seconds:.0f}",
        )
    console.print(table)
    console.print(f"completions and figures: {config.folder}", highlight=False)
