"""Named evaluation settings, each with the publication that set them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from plumbline.errors import InputError
from plumbline.rl.text import BOXED


@dataclass(frozen=True)
class Settings:
    """How one benchmark is sampled; the fields are those of rl/batch.py's Sampling, and how often."""

    completions: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048


@dataclass(frozen=True)
class Preset:
    """Settings that others can name.

    Attributes:
        source: where they come from.
        benchmarks: evaluated unless the user names others.
        default: for benchmarks without an entry of their own.
        own: benchmark -> settings.
        system, instruction: the prompt; None: what the policy's folder asks for.
    """

    source: str
    benchmarks: tuple[str, ...]
    default: Settings
    own: dict[str, Settings] = field(default_factory=dict)
    system: str | None = None
    instruction: str | None = None

    def settings(self, benchmark: str) -> Settings:
        return self.own.get(benchmark, self.default)


PRESETS = {
    "limr": Preset(
        source="LIMR (arXiv 2502.11886), its evaluation script and configuration: the instruction is the system message",
        benchmarks=("aime24", "math500", "amc23"),
        default=Settings(4, 0.4, 0.95, 3072),
        own={"math500": Settings(1, 0.0, 0.95, 3072)},
        system=BOXED,
        instruction="",
    ),
    "avg32": Preset(
        source="avg@32 with the sampling of DeepSeek-R1's report (arXiv 2501.12948): temperature 0.6, top-p 0.95, 32,768 tokens",
        benchmarks=("aime24", "aime25", "amc23"),
        default=Settings(32, 0.6, 0.95, 32_768),
    ),
    "greedy": Preset(
        source="one greedy completion of each problem",
        benchmarks=("aime24", "aime25", "math500"),
        default=Settings(),
    ),
}


def choose(preset: str, benchmarks: list[str], **overrides: float | int | None) -> tuple[Preset, dict[str, Settings]]:
    """The preset and the settings of each benchmark, with what the user set put on top (None: not set).

    Raises InputError for an unknown preset.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; use {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    names = benchmarks or list(chosen.benchmarks)
    given = {name: value for name, value in overrides.items() if value is not None}
    return chosen, {name: replace(chosen.settings(name), **given) for name in dict.fromkeys(names)}  # type: ignore[arg-type]
