"""Held-out accuracy while a run trains: the policy as it stands answers config.evaluation's problems."""

from __future__ import annotations

from rich.console import Console

from plumbline.rl.batch import Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.config import RunConfig
from plumbline.rl.evaluation import evaluate, finished_evaluation
from plumbline.rl.tasks import TaskSet, evaluation_tasks


def evaluation_sampling(config: RunConfig) -> Sampling:
    """How held-out problems are answered."""
    settings = config.evaluation
    limit = settings.max_new_tokens or config.rollout.max_new_tokens
    return Sampling(limit, settings.temperature, settings.top_p, seed=config.seed + 1)


class HeldOut:
    """Evaluates at the start of a run and every evaluation.every_steps; never, where that is 0.

    Completions and figures go to evaluation/step-000050.jsonl and .json in the run's folder, as `plumbline evaluate` writes
    them; figures of a step that were written before a resume are read back.

    Args:
        config: the run's.
        roles: whose rollout workers hold the policy.
        console: told the accuracy.
    """

    def __init__(self, config: RunConfig, roles: Roles, console: Console) -> None:
        self.config, self.roles, self.console = config, roles, console
        self.tasks: TaskSet | None = None
        if config.evaluation.every_steps:
            from plumbline.rl.text import Codec

            self.tasks, _ = evaluation_tasks(config, Codec(config.policy.path, overrides=config.prompt))

    def measure(self, step: int) -> dict[str, float]:
        """Metrics of the policy after this step (0: the starting policy); none if it is not due."""
        if self.tasks is None or step % self.config.evaluation.every_steps:
            return {}
        sampling, completions = evaluation_sampling(self.config), self.config.evaluation.completions_per_problem
        name, output = f"step-{step:06d}", self.config.folder / "evaluation"
        policy = f"{self.config.name}, {name}"
        result = finished_evaluation(name, self.tasks, sampling, completions, output, policy)
        if result is None:
            result = evaluate(name, self.tasks, self.roles, sampling, completions, output, policy=policy)
        accuracy = result.accuracy
        self.console.print(
            f"{self.config.name}  step {step}: {accuracy} of {accuracy.n} held-out problems",
            highlight=False,
            markup=False,
        )
        return {"evaluation/accuracy": accuracy.mean, "evaluation/low": accuracy.low, "evaluation/high": accuracy.high}
