"""From a command to a running job: check everything, say what will happen, start, report."""

from __future__ import annotations

from rich.console import Console

from plumbline.errors import InputError
from plumbline.models.load import policy_config
from plumbline.rl.config import RunConfig
from plumbline.rl.data import DataReport
from plumbline.rl.grading import load_shaping
from plumbline.rl.optimizers import check_optimizer
from plumbline.rl.output import mark_run, prepare_output
from plumbline.rl.plan import TRAINING_RUNS_OF_A_PIPELINE, make_plan, print_plan
from plumbline.rl.tasks import TaskSet, evaluation_tasks, training_tasks
from plumbline.rl.trackers import check_trackers


def check_settings(config: RunConfig, tasks: TaskSet, report: DataReport, console: Console) -> None:
    """Say what was read; InputError for a reward, an optimizer, a tracker, a sampler or a replay that this run cannot have."""
    from plumbline.rl.collect import make_sampler

    attention = policy_config(config.policy.path, attention=config.policy.attention).attention
    if config.rollout.replay_blocks and attention != "nsa":
        raise InputError(
            f"rollout.replay_blocks replays what sparse attention chose; {config.policy.path} has {attention} attention"
        )
    for line in report.lines():
        console.print(line, highlight=False)
    load_shaping(config)
    check_optimizer(config.learner)
    check_trackers(config.tracking.trackers)
    make_sampler(config, tasks)


def launch_training(config: RunConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> None:
    """`plumbline train`."""
    from plumbline.rl.text import Codec

    codec = Codec(config.policy.path, overrides=config.prompt)
    tasks, report = training_tasks(config, codec)
    check_settings(config, tasks, report, console)
    held_out = evaluation_tasks(config, codec)[0] if config.evaluation.every_steps else None
    plan = make_plan(config)
    prepare_output(config.folder, plan.disk, resume=resume, overwrite=overwrite)
    mark_run(config, "train")
    print_plan(config, plan, len(tasks), console, title=f"plumbline train: {config.name}")

    from plumbline.rl.cluster import Roles
    from plumbline.rl.faults import resumable
    from plumbline.rl.loop import train

    console.print("starting Ray and the workers …")
    with resumable(config.folder):
        with Roles.start(config) as roles:
            result = train(config, roles, tasks, console, held_out=held_out, resume=resume)

        from plumbline.rl.run_report import write_run_report

        write_run_report([config.folder], config.folder / "run.html")
    console.print(
        f"done: {result.steps} steps, {result.rollouts:,} rollouts in {result.seconds:.0f} s; policy in {result.policy}; "
        f"report: {config.folder / 'run.html'}",
        highlight=False,
    )


def launch_pipeline(config: RunConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> None:
    """`plumbline run`."""
    from plumbline.rl.selecting import whole_epochs
    from plumbline.rl.text import Codec

    codec = Codec(config.policy.path, overrides=config.prompt)
    tasks, report = training_tasks(config, codec)
    evaluation_tasks(config, codec)
    check_settings(config, tasks, report, console)
    whole_epochs(config, len(tasks))
    plan = make_plan(config, training_runs=TRAINING_RUNS_OF_A_PIPELINE)
    prepare_output(config.folder, plan.disk, resume=resume, overwrite=overwrite)
    mark_run(config, "run")
    print_plan(
        config,
        plan,
        len(tasks),
        console,
        title=f"plumbline run: {config.name} (each arm; a pre-run of {config.selection.prerun_steps} steps comes first)",
    )

    from plumbline.rl.faults import resumable
    from plumbline.rl.pipeline import accuracy_table, run_pipeline

    console.print("starting Ray and the workers …")
    with resumable(config.folder):
        result = run_pipeline(config, console, resume=resume)
    console.print(accuracy_table(result))
    console.print(
        f"{result.seconds:.0f} s, peak memory {result.peak_rss_mb:,.0f} MB; report: {config.folder / 'report.html'}, "
        f"figures: {config.folder / 'summary.json'}",
        highlight=False,
    )
