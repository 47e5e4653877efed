"""The whole of training, top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import ray
from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.checking import CheckingStage
from plumbline.rl.checkpoint import CheckpointStore
from plumbline.rl.cluster import Roles
from plumbline.rl.config import RunConfig
from plumbline.rl.records import CompletionLog, history_rows, state_metrics, step_metrics, training_batch
from plumbline.rl.tasks import TaskSet
from plumbline.rl.telemetry import Telemetry
from plumbline.selection.history import HistoryWriter
from plumbline.selection.samplers import UniformSampler


@dataclass(frozen=True)
class TrainingResult:
    """Where a finished run left its policy, and what it cost."""

    policy: Path
    steps: int
    rollouts: int
    seconds: float


def train(config: RunConfig, roles: Roles, tasks: TaskSet, console: Console, *, resume: bool = False) -> TrainingResult:
    """Train the policy of `config` on `tasks` for config.steps steps.

    Everything lands in config.folder: history/, completions/, metrics.jsonl, tensorboard/, check.html, checkpoints/.
    With `resume`, work goes on from the newest intact checkpoint as if it had never stopped.

    Raises InputError for a checkpoint that does not fit, TimeoutError when rollout outlasts its deadline,
    NonFiniteGradients, and RewardsUnsound when the reward check stops the run.
    """
    began = time.monotonic()
    folder = config.folder
    groups_per_step, completions = config.rollout.prompts_per_step, config.rollout.completions_per_prompt
    roles.begin(config)
    sampler = UniformSampler(list(tasks), config.seed)
    checkpoints = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    history = HistoryWriter(folder / "history", config.name)
    log = CompletionLog(folder / "completions")
    checking = CheckingStage(config, roles.reward, sampler, console)

    start = 0
    saved = checkpoints.latest(console) if resume else None
    if saved is not None:
        path, state = saved
        if state["samples"] != tasks.fingerprint:
            raise InputError(
                f"checkpoint {path} was trained on other samples than data.source gives now; keep the data when resuming"
            )
        roles.load(path)
        sampler.load_state_dict(state["sampler"])
        checking.load_state_dict(state.get("checking"))
        start = state["step"]
        if start > config.steps:
            raise InputError(f"checkpoint {path} is already at step {start}, beyond steps={config.steps}")
    # What a stopped run wrote after its last checkpoint will be made again.
    history.truncate(state["history_offset"] if saved is not None else 0)
    log.drop_after(start)
    policy_version = roles.sync()

    def checkpoint(step: int) -> Path:
        state = {"sampler": sampler.state_dict(), "history_offset": history.offset, "samples": tasks.fingerprint}
        state |= {"checking": checking.state_dict(), "config": config.model_dump(mode="json")}
        return checkpoints.save(step, state, roles.save)

    newest = saved[0] if saved is not None else None
    with Telemetry(config, start, console) as telemetry:
        for step in range(start + 1, config.steps + 1):
            clock = time.monotonic()
            sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature, seed=config.seed)
            prompts = [
                Prompt(index, draw.sample_id, tasks[draw.sample_id].token_ids, tasks[draw.sample_id].problem.problem,
                       tasks[draw.sample_id].problem.answer, draw.epoch, key=step)
                for index, draw in enumerate(sampler.next(groups_per_step))
            ]  # fmt: skip
            groups = sorted(roles.graded_groups(prompts, completions, sampling), key=lambda group: group.prompt.index)
            rollout_seconds = time.monotonic() - clock

            sampler.update({group.prompt.sample_id: group.correct for group in groups})
            history.append(history_rows(groups, step))
            log.write(step, groups)

            batch = training_batch(groups)
            update = roles.update(batch)
            checked = checking.check(step, groups)  # on the reward workers, while the learner works
            metrics = ray.get(update)[0] | checked
            used_version, policy_version = policy_version, roles.sync()

            step_seconds = time.monotonic() - clock
            metrics |= state_metrics(groups, len(tasks), used_version, rollout_seconds, step_seconds)
            metrics |= step_metrics(groups, batch, rollout_seconds, step_seconds)
            metrics["policy_version"] = policy_version
            telemetry.log(step, metrics)
            if step == config.steps or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
                newest = checkpoint(step)
            checking.enforce()
    history.close()
    assert newest is not None  # a checkpoint is written at the last step, or was resumed from
    rollouts = config.steps * groups_per_step * completions
    return TrainingResult(newest / "policy", config.steps, rollouts, time.monotonic() - began)
