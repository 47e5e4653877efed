"""Modes of rl_step.py that others' code runs: TRL with both of its engines, and vLLM by itself. Each is a function
(settings, keep) for a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.processes import Keep
from benchmarks.rl_bench import DEVICE, Bench, Graders, machine, now, peak_gib
from plumbline.models.load import load_tokenizer, policy_folder


def trl_vllm(settings: dict[str, Any], keep: Keep) -> None:
    """TRL's GRPOTrainer with vLLM in its own process (vllm_mode colocate)."""
    import vllm

    keep({"engine": f"vLLM {vllm.__version__}, colocated"})
    bench = Bench(settings)
    _trl(
        bench,
        keep,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=settings["memory_share"],
        vllm_max_model_length=bench.longest(),
        vllm_importance_sampling_correction=settings["trl_correction"],
    )


def trl_generate(settings: dict[str, Any], keep: Keep) -> None:
    """TRL's GRPOTrainer with its own `generate` (transformers)."""
    keep({"engine": "transformers generate"})
    few = {"warmup": 1, "steps": settings["generate_steps"]}
    _trl(Bench(settings | few), keep)


def _trl(bench: Bench, keep: Keep, **engine: Any) -> None:
    """Steps of TRL's trainer, from the end of one optimizer step to the end of the next. It gives vLLM the new weights
    at the start of a rollout, so each step holds one transfer, as ours do."""
    import tempfile

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    keep({"machine": machine(), "version": version("trl")})
    settings, config, codec = bench.settings, bench.config, bench.codec
    total = config.rollout.prompts_per_step * config.rollout.completions_per_prompt
    batch = min(settings["trl_batch"], total)
    problems = [row for window in bench.order for row in bench.problems(window)]
    encoded = [codec.encode(row["problem"]) for row in problems]
    texts = [codec.tokenizer.decode(ids) for ids in encoded]
    # TRL tokenizes the text once more, and is to read what the other modes read.
    alike = sum(codec.tokenizer(text)["input_ids"] == ids for text, ids in zip(texts, encoded, strict=True))
    keep({"prompts_read_alike": alike / len(encoded)})
    data = Dataset.from_list(
        [{"prompt": text, "gold": row["answer"]} for text, row in zip(texts, problems, strict=True)]
    )
    parts: dict[str, list[float]] = {"rollout": [], "sync": [], "reward_wait": [], "tokens": [], "reward": []}

    def reward(completions: list[str], completion_ids: list[list[int]], gold: list[str], **_: Any) -> list[float]:
        began = now()
        pairs = list(zip(completions, gold, strict=True))
        sent = [graders.submit(pairs[first : first + 8]) for first in range(0, len(pairs), 8)]
        rewards = [float(verdict.correct) for part in sent for verdict in part.result()]
        parts["tokens"].append(sum(len(ids) for ids in completion_ids))
        parts["reward"].append(statistics.fmean(rewards))
        parts["reward_wait"].append(now() - began)
        return rewards

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = now()
            self.steps: list[dict[str, float]] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = now()
            record = {"step": end - self.last}
            self.last = end
            tokens, waited = parts["tokens"][-1], parts["reward_wait"][-1]
            if parts["rollout"]:
                sync = parts["sync"][-1] if parts["sync"] else 0.0
                rolling = parts["rollout"][-1] - sync
                rest = record["step"] - parts["rollout"][-1] - waited
                record |= {"rollout": rolling, "reward_wait": waited, "update": rest, "sync": sync}
                record["rollout_tokens_per_second"] = tokens / rolling
            self.steps.append(record | {"completion_tokens": tokens, "reward": parts["reward"][-1]})
            keep(bench.summary(self.steps) | {"torch_peak_gib": peak_gib()})

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Graders(settings["graders"]) as graders:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(str(policy_folder(config.policy.path)), dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(
                folder,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=total // batch,
                num_generations=config.rollout.completions_per_prompt,
                max_completion_length=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                learning_rate=config.learner.learning_rate,
                lr_scheduler_type="constant",
                loss_type="grpo",
                beta=0.0,
                bf16=DEVICE == "cuda",
                use_cpu=DEVICE == "cpu",
                gradient_checkpointing=False,
                max_steps=bench.warmup + bench.steps,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                shuffle_dataset=False,
                **engine,
            ),
            train_dataset=data,
            processing_class=load_tokenizer(config.policy.path),
            callbacks=[Clock()],
        )
        keep({"start_seconds": time.perf_counter() - began})
        # Names inside TRL 1.16; another version without them gives whole steps only.
        _timed(trainer, "_generate_single_turn", parts["rollout"])
        _timed(getattr(trainer, "vllm_generation", None), "sync_weights", parts["sync"])
        trainer.train()


def _timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Have each call of a method of one object write down its time, if it has that method."""
    inner: Callable[..., Any] | None = getattr(owner, name, None)
    if inner is None:
        return

    def timed(*arguments: Any, **named: Any) -> Any:
        began = now()
        result = inner(*arguments, **named)
        seconds.append(now() - began)
        return result

    setattr(owner, name, timed)


def vllm_alone(settings: dict[str, Any], keep: Keep) -> None:
    """vLLM answers each step's prompts; nothing is learnt. With the drawn tokens' log-probabilities, as a learner needs
    them, and without."""
    import vllm
    from vllm import LLM, SamplingParams

    keep({"engine": f"vLLM {vllm.__version__}"})
    bench = Bench(settings)
    config = bench.config.rollout
    began = time.perf_counter()
    llm = LLM(
        model=str(policy_folder(bench.config.policy.path)),
        dtype=config.precision,
        max_model_len=bench.longest(),
        max_num_seqs=config.slots,
        gpu_memory_utilization=settings["alone_memory_share"],
        logprobs_mode="processed_logprobs",
        seed=0,
    )
    keep({"start_seconds": time.perf_counter() - began})
    for name, logprobs in (("with_logprobs", 0), ("tokens_only", None)):
        sampling = SamplingParams(
            n=config.completions_per_prompt,
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            logprobs=logprobs,
            ignore_eos=True,
            stop_token_ids=sorted(bench.codec.end_ids),
            detokenize=False,
        )
        steps: list[dict[str, float]] = []
        for window in bench.order:
            # What the last pass cached of these prompts is not to help this one.
            llm.reset_prefix_cache()
            prompts = [{"prompt_token_ids": bench.codec.encode(row["problem"])} for row in bench.problems(window)]
            began = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
            tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
            rate = tokens / seconds
            steps.append({"rollout": seconds, "completion_tokens": tokens, "rollout_tokens_per_second": rate})
            keep({name: bench.summary(steps)})
