"""What the modes of rl_step.py share: the prompts of each step, the clock, the graders; random policies and the clock
serve long_rollout.py and weight_sync.py too."""

from __future__ import annotations

import json
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from plumbline.rewards.workers import Grader
from plumbline.rl.config import RunConfig, parse_config
from plumbline.rl.text import Codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Bench:
    """What all modes share: the prompts of each step, the clock, the graders.

    Measured step i takes the i-th window of the file in every mode; steps that warm up take those behind.
    """

    def __init__(self, settings: dict[str, Any], engine: str = "native") -> None:
        self.settings = settings
        self.config = run_config(settings, engine)
        self.codec = Codec(self.config.policy.path)
        with Path(settings["data"]).open(encoding="utf-8") as file:
            self.rows = [json.loads(line) for line in file]
        longest = settings["max_prompt_tokens"]
        if longest:
            self.rows = [row for row in self.rows if len(self.codec.encode(row["problem"])) <= longest]
        self.warmup, self.steps = settings["warmup"], settings["steps"]

    @property
    def order(self) -> list[int]:
        """Windows in the order of the steps: those that warm up first."""
        return [*range(self.steps, self.steps + self.warmup), *range(self.steps)]

    def problems(self, window: int) -> list[dict[str, str]]:
        size = self.config.rollout.prompts_per_step
        return [self.rows[i % len(self.rows)] for i in range(window * size, (window + 1) * size)]

    def longest(self) -> int:
        """Tokens of a prompt and its completion, in any step."""
        prompts = [self.codec.encode(row["problem"]) for window in self.order for row in self.problems(window)]
        return max(len(ids) for ids in prompts) + self.config.rollout.max_new_tokens

    def summary(self, steps: list[dict[str, float]]) -> dict[str, Any]:
        """Steps so far, those that warm up apart, and the medians of the others."""
        counted = steps[self.warmup :]
        made: dict[str, Any] = {"warmup_steps": steps[: self.warmup], "steps": counted}
        if counted:
            made["median"] = {name: statistics.median(step[name] for step in counted) for name in counted[0]}
        return made


def run_config(settings: dict[str, Any], engine: str) -> RunConfig:
    precision = "bfloat16" if DEVICE == "cuda" else "float32"
    rollout = {
        "engine": engine,
        "memory_share": settings["memory_share"],
        "gpus_per_worker": 1,  # the vLLM engine then keeps its memory between steps, as the others do
        "prompts_per_step": settings["prompts"],
        "completions_per_prompt": settings["completions"],
        "max_new_tokens": settings["max_new_tokens"],
        "slots": settings["slots"] or settings["prompts"] * settings["completions"],
        "precision": precision,
    }
    learner = {
        "precision": precision,
        "tokens_per_microbatch": settings["tokens_per_microbatch"],
        "logprob_chunk_tokens": 8192,
        "liger": settings["liger"],
        "optimizer": settings["optimizer"],
    }
    return parse_config(
        {
            "name": "rl_step",
            "policy": {"path": settings["policy"], "attention": settings["attention"], "device": DEVICE},
            "rollout": rollout,
            "learner": learner,
            "algorithm": {"advantage": "grpo", "aggregation": "sequence"},
        }
    )


def random_policy(folder: Path, shape: dict[str, Any], dtype: torch.dtype, codec: Codec | None = None) -> None:
    """A policy folder with random weights, and the codec's tokenizer if one is given; kept if it is there already.

    shape: fields of a PolicyConfig.
    """
    from plumbline.models.config import PolicyConfig
    from plumbline.models.policy import Policy

    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    with torch.device(DEVICE):
        policy = Policy(PolicyConfig(**shape))
    partial = folder.with_name("partial")  # a process that is cut off leaves no half of a policy
    policy.to(dtype).save_pretrained(partial)
    del policy
    if codec is not None:
        codec.save(partial)
    partial.rename(folder)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Graders:
    """Several grading processes behind one thread each, so that grading goes on beside generation."""

    def __init__(self, count: int) -> None:
        self.grader = Grader(count)
        self.grader.start()
        self.pool = ThreadPoolExecutor(count)

    def submit(self, pairs: list[tuple[str, str]]) -> Any:
        return self.pool.submit(self.grader.grade_many, pairs)

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.grader.close()


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> float:
    """Most of the GPU's memory that torch's allocator gave out; 0 without one. An engine in this process is in it."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0


def machine() -> dict[str, str]:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": name, "python": platform.python_version(), **versions}
