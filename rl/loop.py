"""The whole of training, top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.ahead import Ahead
from plumbline.rl.checking import CheckingStage
from plumbline.rl.checkpoint import CheckpointStore
from plumbline.rl.cluster import Roles
from plumbline.rl.collect import Collector
from plumbline.rl.config import RunConfig
from plumbline.rl.files import writing
from plumbline.rl.heldout import HeldOut
from plumbline.rl.records import CompletionLog, history_rows, state_metrics, step_metrics, training_batch
from plumbline.rl.tasks import TaskSet
from plumbline.rl.telemetry import Telemetry
from plumbline.selection.history import HistoryWriter


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished run left its policy, and what it cost."""

    policy: Path
    steps: int
    rollouts: int
    seconds: float


def train(
    config: RunConfig,
    roles: Roles,
    tasks: TaskSet,
    console: Console,
    *,
    held_out: TaskSet | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train the policy of `config` on `tasks` for config.steps steps.

    held_out: what evaluation.every_steps is measured on, where the caller has read it already.

    Everything lands in config.folder: history/, completions/, metrics.jsonl, tensorboard/, check.html, checkpoints/.
    With `resume`, work goes on from the newest intact checkpoint as if it had never stopped.

    Raises InputError for a checkpoint that does not fit, RunStopped when a role fails or a deadline passes (NonFiniteGradients
    is one), OSError for a full disk, and RewardsUnsound when the reward check stops the run.
    """
    began = time.monotonic()
    folder = config.folder
    roles.begin(config)
    collector = Collector(config, roles, tasks)
    checkpoints = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    history = HistoryWriter(folder / "history", config.name)
    log = CompletionLog(folder / "completions")
    checking = CheckingStage(config, roles.reward, collector, console)
    measured = HeldOut(config, roles, console, held_out)

    start = 0
    saved = checkpoints.latest(console) if resume else None
    if saved is not None:
        path, state = saved
        if state["samples"] != tasks.fingerprint:
            raise InputError(
                f"checkpoint {path} was trained on other samples than data.source gives now; keep the data when resuming"
            )
        roles.load(path)
        collector.load_state_dict(state["sampler"])
        checking.load_state_dict(state.get("checking"))
        start = state["step"]
        if start > config.steps:
            raise InputError(f"checkpoint {path} is already at step {start}, beyond steps={config.steps}")
    # What a stopped run wrote after its last checkpoint will be made again.
    history.truncate(state["history_offset"] if saved is not None else 0)
    log.drop_after(start)
    policy_version = roles.sync()
    measured.measure(start)

    def checkpoint(step: int) -> None:
        state = {"sampler": ahead.state(step), "history_offset": history.offset, "samples": tasks.fingerprint}
        state |= {"checking": checking.state_dict(), "config": config.model_dump(mode="json")}
        checkpoints.begin(step, state, roles)

    with (
        history,
        Telemetry(config, start, console) as telemetry,
        checkpoints,
        Ahead(collector, config, start) as ahead,
    ):
        for step in range(start + 1, config.steps + 1):
            clock = time.monotonic()
            roles.clock.lap()
            filled = ahead.take(step)
            with writing(history.folder):
                history.append(history_rows(filled.graded, step))
            log.write(step, filled.graded)

            batch = training_batch(filled.groups, replay_blocks=config.rollout.replay_blocks)
            update = roles.update(batch)
            checked = checking.check(step, filled.graded)  # on the reward workers, while the learner works
            metrics = update() | checked
            used_version, policy_version = policy_version, roles.sync()
            ahead.trained(step)

            metrics |= state_metrics(filled.graded, len(tasks), used_version, roles.clock.lap())
            metrics |= filled.metrics | step_metrics(filled.graded, filled.seconds, time.monotonic() - clock)
            metrics |= {"policy_version": policy_version, "replaced_workers": roles.replaced}
            metrics["time/sync_seconds"] = roles.sync_seconds
            telemetry.log(step, metrics | measured.measure(step))
            checkpoints.poll()
            if config.checkpoint_due(step):
                checkpoint(step)  # its files are written while training goes on
            checking.enforce()
    assert checkpoints.newest is not None  # a checkpoint is written at the last step, or was resumed from
    return TrainingResult(checkpoints.newest / "policy", config.steps, history.offset, time.monotonic() - began)
