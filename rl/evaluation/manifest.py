"""Everything that decides an evaluation's completions, written beside them, so that it can be repeated and checked."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from plumbline.errors import InputError
from plumbline.rl.files import sha256, write_whole
from plumbline.rl.trackers import flat

MANIFEST = "manifest.json"
# Files of a policy folder that decide what it answers.
MODEL_SUFFIXES = (".json", ".jinja", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".py")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelPart(Part):
    """What answers. `files` are SHA-256 by name; none for a served model, whose weights are not seen here."""

    path: str
    attention: str | None = None
    files: dict[str, str] = {}


class EnginePart(Part):
    """How it runs. `threads` are torch's on a CPU; the number changes the order of sums, and so the last bits."""

    name: str
    url: str | None = None
    device: str = "cpu"
    workers: int = 1
    slots: int = 64
    threads: int | None = None


class PromptPart(Part):
    """The prompt style as resolved."""

    template: str | None = None
    system: str | None = None
    instruction: str = ""
    max_tokens: int = 4096


class GradingPart(Part):
    timeout_seconds: float = 2.0
    memory_gib: float = 0.5


class BenchmarkPart(Part):
    """One benchmark: what it held and how it was sampled. `fingerprint` covers ids, encoded prompts and golds;
    `too_long` are ids left out for their prompt."""

    name: str
    source: str
    limit: int | None = None
    problems: int
    too_long: list[str] = []
    fingerprint: str
    completions: int
    temperature: float
    top_p: float
    max_new_tokens: int
    shard_problems: int | None = None


class ResultPart(Part):
    """What came out."""

    completions_sha256: str
    accuracy: dict[str, float]
    seconds: float


class Manifest(Part):
    """See module docstring. `attempts` counts starts: 1 plus the resumptions."""

    format: int = 1
    model: ModelPart
    engine: EnginePart
    prompt: PromptPart
    grading: GradingPart = GradingPart()
    seed: int
    benchmarks: list[BenchmarkPart]
    versions: dict[str, str]
    machine: dict[str, str]
    attempts: int = 1
    results: dict[str, ResultPart] = {}

    def write(self, folder: Path) -> None:
        write_whole(folder / MANIFEST, self.model_dump_json(indent=2) + "\n")


@dataclass
class Repetition:
    """How a repeated evaluation compares with its manifest.

    Attributes:
        equal: benchmarks whose completions are the same, bit for bit.
        different: benchmarks whose completions are not.
        changes: versions and machine, `name: then -> now`, where they differ.
    """

    equal: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def read_manifest(path: Path) -> Manifest:
    """A manifest file, or the one in an evaluation's folder. InputError when it cannot be read as one."""
    file = path / MANIFEST if path.is_dir() else path
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"manifest {file} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise InputError(f"{file} is not an evaluation's manifest: {where}: {problem['msg']}") from None


def model_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a policy folder that decide what it answers."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in MODEL_SUFFIXES)
    return {path.name: sha256(path) for path in files}


def machine() -> dict[str, str]:
    """What the numbers were computed on."""
    import torch

    found = {"processor": _processor(), "cores": str(os.cpu_count()), "system": platform.platform()}
    for number in range(torch.cuda.device_count()):
        found[f"gpu{number}"] = torch.cuda.get_device_name(number)
    return found


def differences(wanted: Manifest, now: Manifest) -> list[str]:
    """What decides completions and is not the same: `what: wanted -> now`, versions and machine left out."""
    before, after = _deciding(wanted), _deciding(now)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def compare_results(wanted: Manifest, now: Manifest) -> Repetition:
    """After a repetition: equal or not, and what else changed."""
    found = Repetition()
    for name, result in wanted.results.items():
        same = name in now.results and now.results[name].completions_sha256 == result.completions_sha256
        (found.equal if same else found.different).append(name)
    for kind in ("versions", "machine"):
        before, after = getattr(wanted, kind), getattr(now, kind)
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                found.changes.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return found


def _deciding(manifest: Manifest) -> dict[str, Any]:
    tree = manifest.model_dump(include={"model", "engine", "prompt", "grading", "seed", "benchmarks"})
    tree["model"].pop("path")  # a model may move
    tree["benchmarks"] = {part["name"]: part for part in tree["benchmarks"]}
    return dict(flat(tree))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
