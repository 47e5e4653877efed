"""From `plumbline evaluate` to results: check everything, say what will happen, start, report."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from plumbline.errors import InputError
from plumbline.rl.batch import Sampling
from plumbline.rl.config import parse_config
from plumbline.rl.output import mark_run, prepare_output
from plumbline.rl.plan import make_plan
from plumbline.rl.tasks import TaskSet, evaluation_tasks


def evaluation_name(model: str) -> str:
    """Name of a model's evaluation, and of its folder in runs/."""
    return "evaluate-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model")


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
        raise InputError("--benchmarks names nothing; for example aime24,math500, or --loss-on FILE")
    tree = {
        "name": evaluation_name(model),
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
