"""What the user asked `plumbline evaluate` for, and the manifest it resolves to before anything is computed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from plumbline.errors import InputError
from plumbline.rl.config import RunConfig, parse_config
from plumbline.rl.data import BENCHMARKS, FILE_TYPES
from plumbline.rl.device import pick_device, usable_cpus
from plumbline.rl.evaluation.endpoint import Messages
from plumbline.rl.evaluation.manifest import (
    BenchmarkPart,
    EnginePart,
    Manifest,
    ModelPart,
    PromptPart,
    machine,
    model_files,
)
from plumbline.rl.evaluation.presets import Settings, choose
from plumbline.rl.output import versions
from plumbline.rl.tasks import Encoder, TaskSet, evaluation_tasks
from plumbline.rl.text import BOXED, Codec

MAX_PROMPT_TOKENS = 4096
# A shard holds this many times as many completions as are decoded at once: few idle slots at its end, little lost to a kill.
ROUNDS_PER_SHARD = 4
# Files that an evaluation's folder holds besides those of its benchmarks.
TAKEN = ("manifest", "run", "overlap", "losses", "config", "metrics")
# Stands for the only model that a server has.
SERVED = "served"
ENGINES = ("native", "vllm", "endpoint")


# A benchmark's name, source, limit, settings and problems a shard (None: not chosen yet).
Chosen = tuple[str, str, int | None, Settings, int | None]


@dataclass(frozen=True)
class Request:
    """The command's options; None means not set, so that a preset or a manifest decides."""

    model: str | None = None
    benchmarks: list[str] = field(default_factory=list)
    preset: str = "greedy"
    limit: int | None = None
    completions: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    system: str | None = None
    instruction: str | None = None
    engine: str = "native"
    url: str | None = None
    slots: int = 64
    workers: int = 1
    attention: str | None = None
    device: str = "auto"
    seed: int = 0
    output: Path | None = None
    manifest: Path | None = None
    training: list[str] = field(default_factory=list)
    resume: bool = False
    overwrite: bool = False


@dataclass
class Job:
    """A request resolved: its manifest, the config of the Ray roles, and the problems of each benchmark by name."""

    manifest: Manifest
    config: RunConfig
    tasks: dict[str, TaskSet]
    messages: Messages | None


def file_name(text: str) -> str:
    """A data source's or a model's name as part of a path: `procedural-heldout` for procedural:heldout."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def evaluation_name(model: str, verb: str = "evaluate") -> str:
    """Name of a model's evaluation, and of its folder in runs/."""
    return f"{verb}-{file_name(model)[-80:]}"


def benchmark_name(source: str) -> str:
    """`math500` for its hub id and for a file math500.jsonl too, so that a preset knows it; `own` for data/own.jsonl."""
    for name, (_, hub, _, _) in BENCHMARKS.items():
        if source in (name, hub) or Path(source).stem == name:
            return name
    path = Path(source)
    name = file_name(path.stem if path.suffix in FILE_TYPES else source)
    return f"{name}-problems" if name in TAKEN else name


def resolve(request: Request, console: Console) -> Job:
    """Check the request, read the benchmarks and describe the evaluation. InputError for whatever does not fit."""
    if request.engine not in ENGINES:
        raise InputError(f"unknown engine {request.engine!r}; use {', '.join(ENGINES)}")
    if request.model is None and request.engine != "endpoint":
        raise InputError("name a MODEL: embedded, smollm2, a policy folder, a checkpoint or a hub id")
    if (request.engine == "endpoint") != (request.url is not None):
        raise InputError("--engine endpoint and --url http://HOST:PORT/v1 belong together")
    named = {benchmark_name(source): source for source in request.benchmarks}
    if len(named) < len(dict.fromkeys(request.benchmarks)):
        raise InputError(f"two of {', '.join(request.benchmarks)} have one name; evaluate them in separate folders")
    preset, settings = choose(
        request.preset,
        list(named),
        completions=request.completions,
        temperature=request.temperature,
        top_p=request.top_p,
        max_new_tokens=request.max_new_tokens,
    )
    prompt = {
        "system": preset.system if request.system is None else request.system,
        "instruction": preset.instruction if request.instruction is None else request.instruction,
    }
    parts: list[Chosen] = [
        (name, named.get(name, name), request.limit, chosen, None) for name, chosen in settings.items()
    ]
    engine = EnginePart(
        name=request.engine,
        url=request.url,
        device="server" if request.engine == "endpoint" else pick_device(request.device),
        workers=request.workers,
        slots=request.slots,
        threads=None if request.engine == "endpoint" else usable_cpus(),
    )
    return _job(request, engine, prompt, parts, request.seed, "evaluate", console)


def repeat(request: Request, wanted: Manifest, console: Console) -> Job:
    """The same evaluation from its manifest; only the model's place and the output may be others."""
    parts: list[Chosen] = [
        (
            part.name,
            part.source,
            part.limit,
            Settings(part.completions, part.temperature, part.top_p, part.max_new_tokens),
            part.shard_problems,
        )
        for part in wanted.benchmarks
    ]
    prompt = wanted.prompt.model_dump(exclude={"max_tokens"})
    if wanted.engine.device not in ("server", pick_device("auto")):
        pick_device(wanted.engine.device)  # says what is missing
    model = request.model or wanted.model.path
    asked = Request(
        model=model,
        attention=wanted.model.attention,
        engine=wanted.engine.name,
        url=wanted.engine.url,
        output=request.output,
    )
    return _job(asked, wanted.engine, prompt, parts, wanted.seed, "repeat", console)


def _job(
    request: Request,
    engine: EnginePart,
    prompt: dict[str, str | None],
    parts: list[Chosen],
    seed: int,
    verb: str,
    console: Console,
) -> Job:
    served = engine.name == "endpoint"
    model = request.model or SERVED
    tree = {
        "name": evaluation_name(model, verb),
        "output": str(request.output) if request.output else None,
        "seed": seed,
        "policy": {"path": model, "attention": request.attention} | ({} if served else {"device": engine.device}),
        "prompt": {"max_tokens": MAX_PROMPT_TOKENS, **{k: v for k, v in prompt.items() if v is not None}},
        "rollout": {
            "workers": engine.workers,
            "slots": engine.slots,
            "threads_per_worker": engine.threads,
            "max_new_tokens": max(settings.max_new_tokens for *_, settings, _ in parts),
            "gpus_per_worker": 1 if engine.device.startswith("cuda") else 0,
            "timeout_seconds": 7 * 86400,
        }
        | ({} if served else {"engine": engine.name}),
    }
    config = parse_config(tree, where="plumbline evaluate")
    messages: Messages | None = None
    encoder: Encoder
    if served:
        instruction = prompt.get("instruction")
        messages = Messages(prompt.get("system"), BOXED if instruction is None else instruction)
        style = PromptPart(system=messages.style.system, instruction=messages.style.instruction)
        # Messages are counted in bytes here; the server knows its own limit.
        config.prompt.max_tokens = 1_000_000
        encoder = messages
        files: dict[str, str] = {}
    else:
        from plumbline.models.load import policy_folder

        encoder = codec = Codec(model, overrides=config.prompt)
        files = model_files(policy_folder(model))
        style = PromptPart(
            template="chat" if codec.chat else "plain", system=codec.style.system, instruction=codec.style.instruction
        )
    style.max_tokens = config.prompt.max_tokens
    described: list[BenchmarkPart] = []
    tasks: dict[str, TaskSet] = {}
    for name, source, limit, settings, shard in parts:
        section = config.evaluation.model_copy(update={"source": source, "limit": limit})
        tasks[name], report = evaluation_tasks(config.model_copy(update={"evaluation": section}), encoder)
        for line in report.lines():
            console.print(line, highlight=False, markup=False)
        if engine.name == "native" and shard is None:
            shard = max(1, math.ceil(ROUNDS_PER_SHARD * engine.slots * engine.workers / settings.completions))
        described.append(
            BenchmarkPart(
                name=name,
                source=source,
                limit=limit,
                problems=len(tasks[name]),
                too_long=tasks[name].too_long,
                fingerprint=tasks[name].fingerprint,
                completions=settings.completions,
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_new_tokens=settings.max_new_tokens,
                shard_problems=shard,
            )
        )
    manifest = Manifest(
        model=ModelPart(path=model, attention=request.attention, files=files),
        engine=engine,
        prompt=style,
        seed=seed,
        benchmarks=described,
        versions=versions(),
        machine=machine(),
    )
    return Job(manifest, config, tasks, messages)
