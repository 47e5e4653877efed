"""Small pieces that tests of plumbline, and of code built on it, share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plumbline.rewards.verdict import Verdict

if TYPE_CHECKING:
    from plumbline.rl.cluster import Roles
    from plumbline.rl.config import RunConfig
    from plumbline.rl.loop import TrainingResult


def short_is_good(verdict: Verdict, response: str, truncated: bool) -> float:
    """A reward that any policy can earn more of: minus the length of the response in characters, over ten."""
    return -len(response) / 10


def changed(tree: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A config tree with other values: `steps=2`, or `rollout__slots=4` for one key of a section."""
    made = dict(tree)
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        made[section] = {**made.get(section, {}), name: value} if name else value
    return made


def train_quietly(config: RunConfig, roles: Roles, *, resume: bool = False) -> TrainingResult:
    """Train on the config's own data, in its folder, without a word."""
    from rich.console import Console

    from plumbline.rl.loop import train
    from plumbline.rl.tasks import training_tasks
    from plumbline.rl.text import Codec

    tasks, _ = training_tasks(config, Codec(config.policy.path, overrides=config.prompt))
    config.folder.mkdir(parents=True, exist_ok=True)
    return train(config, roles, tasks, Console(quiet=True), resume=resume)
