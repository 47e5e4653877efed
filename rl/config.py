"""The one typed configuration tree: the sections of sections.py put together, read from YAML and checked.

A run is a YAML file plus dotted overrides (`rollout.prompts_per_step=8`). Unknown keys are refused with the nearest
valid name.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator

from plumbline.errors import InputError
from plumbline.rl.sections import (
    AlgorithmSection,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    LearnerSection,
    PolicySection,
    PromptSection,
    RaySection,
    RewardSection,
    RolloutSection,
    Section,
    SelectionSection,
    TrackingSection,
)


class RunConfig(Section):
    """A whole run."""

    name: str = Field(
        ...,
        min_length=1,
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        description="Name of the run; also in the history.",
    )
    output: str | None = Field(None, description="Folder for everything the run writes; None: runs/<name>.")
    seed: int = Field(0, ge=0, description="Everything random derives from it.")
    steps: PositiveInt = Field(100, description="Training steps.")
    policy: PolicySection = Field(default_factory=PolicySection)
    prompt: PromptSection = Field(default_factory=PromptSection)
    data: DataSection = Field(default_factory=DataSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    learner: LearnerSection = Field(default_factory=LearnerSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    selection: SelectionSection = Field(default_factory=SelectionSection)
    ray: RaySection = Field(default_factory=RaySection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    @property
    def overlong_buffer_tokens(self) -> int:
        return self.reward.overlong_buffer_tokens or max(1, self.rollout.max_new_tokens // 5)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        every = self.checkpoint.every_steps
        return step == self.steps or bool(every and step % every == 0)

    @field_validator("output")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("output must name a folder")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.learner.minibatches > self.rollout.prompts_per_step:
            raise ValueError(
                f"learner.minibatches ({self.learner.minibatches}) must not exceed "
                f"rollout.prompts_per_step ({self.rollout.prompts_per_step}): a group is never split"
            )
        if self.learner.optimizer == "adamw_8bit" and self.learner.workers > 1:
            raise ValueError(
                f"learner.optimizer adamw_8bit needs learner.workers 1, not {self.learner.workers}: bitsandbytes' blocks do not fit "
                "shards; adamw divides its moments over the workers, adamw_offload also takes them off the GPUs"
            )
        if self.overlong_buffer_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong_buffer_tokens ({self.overlong_buffer_tokens}) must not exceed "
                f"rollout.max_new_tokens ({self.rollout.max_new_tokens})"
            )
        if self.rollout.replay_blocks and self.rollout.engine != "native":
            raise ValueError(
                "rollout.replay_blocks needs rollout.engine native: vLLM does not say which blocks it chose"
            )
        if self.rollout.replay_blocks and self.rollout.max_staleness_steps:
            raise ValueError(
                "rollout.replay_blocks needs rollout.max_staleness_steps 0: completions that new weights carry on are read "
                "again, and the blocks chosen for them change"
            )
        if self.rollout.max_staleness_steps and self.rollout.engine != "native":
            raise ValueError(
                f"rollout.max_staleness_steps ({self.rollout.max_staleness_steps}) needs rollout.engine native: "
                "new weights must reach completions under way"
            )
        if self.rollout.max_staleness_steps and self.rollout.sleep_in_update:
            raise ValueError(
                "rollout.sleep_in_update needs rollout.max_staleness_steps 0: engines go on while the learner learns"
            )
        if self.rollout.max_staleness_steps and self.evaluation.every_steps:
            raise ValueError(
                "evaluation.every_steps needs rollout.max_staleness_steps 0: the workers do not stop between steps; "
                "`plumbline evaluate` measures checkpoints"
            )
        algorithm = self.algorithm
        if algorithm.correction.low > algorithm.correction.high:
            raise ValueError(
                f"algorithm.correction.low ({algorithm.correction.low}) must not exceed high ({algorithm.correction.high})"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides (values are YAML) and validate.

    Raises InputError with one line for a missing or unreadable file, an unknown key (with the nearest valid name) or
    a value out of range.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"config file {path} must hold a mapping of settings, not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], *, where: str = "config") -> RunConfig:
    """Validate a nested dict; InputError on the first problem."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML") from None
    if isinstance(value, str):
        # YAML 1.1 reads `1e-4` as text; people mean a number.
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(dotted, valid_keys(), n=1, cutoff=0.0)
        leaf = difflib.get_close_matches(
            dotted.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in valid_keys()], n=1, cutoff=0.75
        )
        if leaf and near and near[0].rsplit(".", 1)[-1] != leaf[0]:
            near = [k for k in valid_keys() if k.rsplit(".", 1)[-1] == leaf[0]][:1]
        return f"unknown key {dotted!r}; the nearest valid key is {near[0]!r}"
    if problem["type"] == "missing":
        return f"{dotted} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{dotted}: {message}" if dotted else message
    return f"{dotted} = {problem['input']!r}: {message}"


def valid_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """All dotted keys, in the order of declaration."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += valid_keys(field.annotation, f"{prefix}{name}.")
    return keys
