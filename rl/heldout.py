"""Held-out accuracy while a run trains: the policy as it stands answers config.evaluation's problems."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from plumbline.rl.batch import Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.config import RunConfig
from plumbline.rl.evaluation import Evaluation, evaluate, finished_evaluation
from plumbline.rl.tasks import TaskSet, evaluation_tasks


def answer_held_out(
    config: RunConfig,
    name: str,
    tasks: TaskSet,
    roles: Roles,
    policy: str,
    *,
    finished: bool,
    begin: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The policy that the rollout workers hold on held-out problems, as config.evaluation says.

    Args:
        name: of its files in the run's folder, evaluation/<name>.jsonl and .json.
        tasks: the held-out set.
        policy: whose answers these are, kept with the settings.
        finished: read back what an earlier call of the same left there.
        begin: called before the workers are asked.
    """
    settings = config.evaluation
    limit = settings.max_new_tokens or config.rollout.max_new_tokens
    sampling = Sampling(limit, settings.temperature, settings.top_p, seed=config.seed + 1)
    output, completions = config.folder / "evaluation", settings.completions_per_problem
    result = finished_evaluation(name, tasks, sampling, completions, output, policy) if finished else None
    if result is None:
        begin()
        result = evaluate(name, tasks, roles, sampling, completions, output, policy=policy)
    return result


class HeldOut:
    """Evaluates at the start of a run and every evaluation.every_steps; never, where that is 0.

    Completions and figures go to evaluation/step-000050.jsonl and .json in the run's folder, as `plumbline evaluate` writes
    them; figures of a step that were written before a resume are read back.

    Args:
        config: the run's.
        roles: whose rollout workers hold the policy.
        console: told the accuracy.
        tasks: the held-out set; None: it is read here, if it is needed.
    """

    def __init__(self, config: RunConfig, roles: Roles, console: Console, tasks: TaskSet | None) -> None:
        self.config, self.roles, self.console, self.tasks = config, roles, console, tasks
        if config.evaluation.every_steps and tasks is None:
            from plumbline.rl.text import Codec

            self.tasks, _ = evaluation_tasks(config, Codec(config.policy.path, overrides=config.prompt))

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the policy after this step (0: the starting policy); none if it is not due."""
        every = self.config.evaluation.every_steps
        if not every or step % every:
            return {}
        assert self.tasks is not None
        name = f"step-{step:06d}"
        policy = f"{self.config.name}, {name}"
        accuracy = answer_held_out(self.config, name, self.tasks, self.roles, policy, finished=True).accuracy
        self.console.print(
            f"{self.config.name}  step {step}: {accuracy} of {accuracy.n} held-out problems",
            highlight=False,
            markup=False,
        )
        return {"evaluation/accuracy": accuracy.mean, "evaluation/low": accuracy.low, "evaluation/high": accuracy.high}
