"""Small pieces that tests of plumbline, and of code built on it, share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline.rewards.verdict import Verdict

if TYPE_CHECKING:
    from plumbline.rl.batch import TrainingBatch
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


def save_random_policy(folder: Path, policy_path: str, **shape: Any) -> str:
    """A policy with random weights, the same for the same shape, and the tokenizer of `policy_path`, in `folder`.

    shape: fields of a PolicyConfig; what has to do with tokens is the tokenizer's.
    """
    import torch

    from plumbline.models.config import PolicyConfig
    from plumbline.models.load import load_tokenizer
    from plumbline.models.policy import Policy
    from plumbline.rl import coldstart

    tokenizer = load_tokenizer(policy_path)
    torch.manual_seed(1)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    coldstart.save(Policy(PolicyConfig(vocab_size=len(tokenizer), **tokens, **shape)), tokenizer, folder)
    return str(folder)


def random_batch(
    seed: int, *, groups: int = 4, size: int = 3, prompt: int = 6, longest: int = 14, extra: Sequence[int] = ()
) -> TrainingBatch:
    """Random prompts of 2 to `prompt` - 1 tokens and completions of 1 to `longest` - 1; `extra` lengths replace those of the
    first rows. Token ids are those of any vocabulary of 290."""
    import torch

    from plumbline.rl.batch import TrainingBatch

    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(10, 290, (length,), generator=generator).tolist()

    prompts = [ids for _ in range(groups) for ids in [draw(2, prompt)] * size]
    completions = [draw(1, longest) for _ in prompts]
    for row, length in enumerate(extra):
        completions[row] = draw(length, length + 1)
    logprobs = [[-5.7] * len(ids) for ids in completions]
    rewards = torch.rand(len(prompts), generator=generator).tolist()
    return TrainingBatch(prompts, completions, logprobs, rewards, size)


def train_quietly(config: RunConfig, roles: Roles, *, resume: bool = False) -> TrainingResult:
    """Train on the config's own data, in its folder, without a word."""
    from rich.console import Console

    from plumbline.rl.loop import train
    from plumbline.rl.tasks import training_tasks
    from plumbline.rl.text import Codec

    tasks, _ = training_tasks(config, Codec(config.policy.path, overrides=config.prompt))
    config.folder.mkdir(parents=True, exist_ok=True)
    return train(config, roles, tasks, Console(quiet=True), resume=resume)
