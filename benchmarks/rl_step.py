"""One optimizer step of reinforcement learning, ours beside TRL's GRPOTrainer, in one run on one machine.

    python benchmarks/rl_step.py --data gsm8k/train.jsonl --out benchmarks/results/rl_step.json

The work is the same for both: a policy (SmolLM2-135M-Instruct), the same GSM8K prompts in the same chat template, 64
prompts x 8 completions a step, at most 256 new tokens, temperature 1, the same verifier as reward, GRPO, one AdamW step
on all 512 completions, float32 master weights with bfloat16 arithmetic. A step is timed from the first prompt to new
weights in the rollout engine; the first steps, which compile and capture, are not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from plumbline.rewards.workers import Grader
from plumbline.rl.batch import Group, Prompt, Sampling, TrainingBatch
from plumbline.rl.config import RunConfig, parse_config
from plumbline.rl.learner import Learner
from plumbline.rl.learner_state import policy_weights
from plumbline.rl.rollout import make_engine
from plumbline.rl.text import Codec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="smollm2")
    parser.add_argument("--attention", choices=["full", "nsa"])
    parser.add_argument("--data", type=Path, required=True, help="JSONL with `problem` and `answer`")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-microbatch", type=int, default=32768)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--optimizer", default="adamw", help="learner.optimizer")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--trl-steps", type=int, default=2, help="0 leaves TRL out")
    parser.add_argument("--trl-batch", type=int, default=64, help="completions of one of TRL's microbatches")
    parser.add_argument("--graders", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    config = parse_config(
        {
            "name": "rl_step",
            "policy": {"path": arguments.policy, "attention": arguments.attention, "device": device},
            "rollout": {
                "prompts_per_step": arguments.prompts,
                "completions_per_prompt": arguments.completions,
                "max_new_tokens": arguments.max_new_tokens,
                "slots": arguments.prompts * arguments.completions,
                "precision": "bfloat16" if device == "cuda" else "float32",
            },
            "learner": {
                "precision": "bfloat16" if device == "cuda" else "float32",
                "tokens_per_microbatch": arguments.tokens_per_microbatch,
                "logprob_chunk_tokens": 8192,
                "liger": arguments.liger,
                "optimizer": arguments.optimizer,
            },
            "algorithm": {"advantage": "grpo", "aggregation": "sequence"},
        }
    )
    result: dict[str, Any] = {"machine": machine(device), "work": vars(arguments) | {"data": arguments.data.name}}
    result["work"].pop("out")
    with Graders(arguments.graders) as graders:
        result["plumbline"] = ours(config, rows, graders, device, arguments.warmup, arguments.steps)
        if device == "cuda":
            torch.cuda.empty_cache()
        if arguments.trl_steps:
            result["trl"] = trl(config, rows, graders, device, arguments.trl_steps, arguments.trl_batch)
    report(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


class Graders:
    """Several grading processes behind one thread each, so that grading goes on beside generation."""

    def __init__(self, count: int) -> None:
        self.grader = Grader(count)
        self.pool = ThreadPoolExecutor(count)

    def submit(self, pairs: list[tuple[str, str]]) -> Any:
        return self.pool.submit(self.grader.grade_many, pairs)

    def __enter__(self) -> Graders:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.grader.close()


def ours(
    config: RunConfig, rows: list[dict[str, str]], graders: Graders, device: str, warmup: int, steps: int
) -> dict[str, Any]:
    """Seconds of each phase of each counted step."""
    codec = Codec(config.policy.path)
    settings = config.rollout
    engine = make_engine(config, config.policy.path, config.policy.attention, codec, device)
    learner = Learner(config, device)
    phases: list[dict[str, float]] = []
    for step in range(warmup + steps):
        problems = rows[step * settings.prompts_per_step : (step + 1) * settings.prompts_per_step]
        began = now(device)
        prompts = [
            Prompt(index, row["id"], codec.encode(row["problem"]), row["problem"], row["answer"], key=step)
            for index, row in enumerate(problems)
        ]
        sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=0)
        groups, verdicts = [], []
        for group in engine.generate(prompts, settings.completions_per_prompt, sampling):
            groups.append(group)
            verdicts.append(graders.submit([(c.text, group.prompt.gold) for c in group.completions]))
        rolled_out = now(device)
        for group, graded in zip(groups, verdicts, strict=True):
            group.rewards = [float(verdict.correct) for verdict in graded.result()]
        rewarded = now(device)
        metrics = learner.update(training_batch(groups))
        updated = now(device)
        engine.load_weights(learner.version, policy_weights(learner))
        synced = now(device)
        if step < warmup:
            continue
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        phases.append(
            {
                "step": synced - began,
                "rollout": rolled_out - began,
                "reward_wait": rewarded - rolled_out,
                "update": updated - rewarded,
                "sync": synced - updated,
                "completion_tokens": tokens,
                "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
                "rollout_tokens_per_second": tokens / (rolled_out - began),
                "reward": statistics.fmean(r for group in groups for r in group.rewards),
                "ratio_max": metrics["learner/ratio_max"],
                "ratio_mean": metrics["learner/ratio_mean"],
            }
        )
    return {"steps": phases, "median": {name: statistics.median(p[name] for p in phases) for name in phases[0]}}


def training_batch(groups: list[Group]) -> TrainingBatch:
    from plumbline.rl import records

    return records.training_batch(sorted(groups, key=lambda group: group.prompt.index))


def trl(
    config: RunConfig, rows: list[dict[str, str]], graders: Graders, device: str, steps: int, batch: int
) -> dict[str, Any]:
    """Seconds of TRL's optimizer steps, its own `generate` (transformers) as engine; the first is not counted."""
    import tempfile

    import trl as package
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from plumbline.models.load import load_tokenizer, policy_folder

    codec = Codec(config.policy.path)
    settings = config.rollout
    total = settings.prompts_per_step * settings.completions_per_prompt
    data = Dataset.from_list(
        [{"prompt": codec.tokenizer.decode(codec.encode(row["problem"])), "gold": row["answer"]} for row in rows]
    )
    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], gold: list[str], **_: Any) -> list[float]:
        lengths.append(sum(len(ids) for ids in completion_ids))
        pairs = list(zip(completions, gold, strict=True))
        parts = [pairs[first : first + 8] for first in range(0, len(pairs), 8)]
        return [float(v.correct) for part in [graders.submit(p) for p in parts] for v in part.result()]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(now(device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(now(device))

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(policy_folder(config.policy.path), dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=total // batch,
                num_generations=settings.completions_per_prompt,
                max_completion_length=settings.max_new_tokens,
                temperature=settings.temperature,
                learning_rate=config.learner.learning_rate,
                loss_type="grpo",
                beta=0.0,
                bf16=device == "cuda",
                use_cpu=device == "cpu",
                gradient_checkpointing=False,
                max_steps=steps + 1,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            train_dataset=data,
            processing_class=load_tokenizer(config.policy.path),
            callbacks=[clock],
        )
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)][1:]
    return {
        "version": package.__version__,
        "engine": "transformers generate",
        "seconds": seconds,
        "completion_tokens": lengths[1:],
        "median": statistics.median(seconds),
    }


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> dict[str, str]:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    return {"device": name, "python": platform.python_version(), **versions}


def report(result: dict[str, Any]) -> None:
    print(" ".join(f"{name} {value}" for name, value in result["machine"].items()))
    median = result["plumbline"]["median"]
    for name, value in median.items():
        print(f"  {name:28s} {value:12,.4f}")
    if "trl" in result:
        other = result["trl"]
        print(f"  TRL {other['version']} ({other['engine']}): {other['median']:.2f} s a step", end="")
        print(f" ({', '.join(f'{s:.2f}' for s in other['seconds'])}; tokens {other['completion_tokens']})")
        print(f"  ratio: {other['median'] / median['step']:.1f}x")


if __name__ == "__main__":
    main()
