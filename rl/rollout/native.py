"""The native engine: continuous batching over cache slots, with log-probabilities. Runs NSA and full attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plumbline.models.load import load_policy
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.rollout.sampler import draw, sequence_key

if TYPE_CHECKING:
    from plumbline.models.cache import PolicyCache
    from plumbline.rl.text import Codec


@dataclass
class _Sequence:
    """One completion under way."""

    prompt: Prompt
    number: int
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class NativeEngine:
    """Answers prompts with the policy at `path`.

    A prompt is read once and its cache copied to its group's slots. Finished sequences free their slot at once; the
    next prompt moves in as soon as a whole group fits.

    Args:
        path: see load_policy.
        attention: see load_policy.
        codec: turns token ids into text and knows the end token.
        slots: sequences decoded at once.
        device: torch device string.
    """

    def __init__(self, path: str, *, attention: str | None, codec: Codec, slots: int, device: str) -> None:
        self.policy = load_policy(path, attention=attention, dtype=torch.float32, device=device)
        self.policy.requires_grad_(False).eval()
        self.codec = codec
        self.slots = slots
        self.device = device
        self.version = 0

    def load_weights(self, version: int, tensors: dict[str, Tensor]) -> None:
        """Copy new weights in place; ValueError if names or shapes are not exactly the policy's."""
        own = dict(self.policy.named_parameters())
        if own.keys() != tensors.keys():
            raise ValueError(f"weights of another policy: {sorted(own.keys() ^ tensors.keys())[:3]}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ValueError(
                        f"weights of another shape: {name} is {list(tensors[name].shape)}, not {list(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])
        self.version = version

    def checksum(self) -> float:
        """Sum of absolute weights in float64: equal on both sides of a transfer if it was whole."""
        return sum(p.detach().double().abs().sum().item() for p in self.policy.parameters())

    @torch.no_grad()
    def generate(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Yield each prompt's group as soon as its last completion ends.

        Args:
            prompts: non-empty token ids each.
            completions: how many of each prompt.
            sampling: see Sampling.
        """
        if not prompts:
            return
        slots = max(self.slots, completions)
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        cache = self.policy.new_cache(min(slots, completions * len(prompts)), longest)
        free = deque(range(min(slots, completions * len(prompts))))
        waiting = deque(prompts)
        running: dict[int, _Sequence] = {}
        done: dict[int, list[Completion | None]] = {prompt.index: [None] * completions for prompt in prompts}
        tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)

        while waiting or running:
            admitted: list[Prompt] = []
            while waiting and len(free) - completions * len(admitted) >= completions:
                admitted.append(waiting.popleft())
            if admitted:
                logits, slot_ids = self._admit(cache, admitted, completions, sampling, free, running)
                advanced = slot_ids
            else:
                advanced = list(running)
                slot_tensor = torch.tensor(advanced, device=self.device)
                logits = self.policy.decode(cache, slot_tensor, tokens[slot_tensor])
            slot_tensor = torch.tensor(advanced, device=self.device)
            keys = torch.tensor([running[slot].key for slot in advanced], device=self.device)
            positions = torch.tensor([len(running[slot].token_ids) for slot in advanced], device=self.device)
            chosen, logprobs = draw(logits, sampling, keys, positions)
            tokens[slot_tensor] = chosen
            released: list[int] = []
            for slot, token, logprob in zip(advanced, chosen.tolist(), logprobs.tolist(), strict=True):
                sequence = running[slot]
                sequence.token_ids.append(token)
                sequence.logprobs.append(logprob)
                ended = token in self.codec.end_ids
                if not ended and len(sequence.token_ids) < sampling.max_new_tokens:
                    continue
                released.append(slot)
                del running[slot]
                group = done[sequence.prompt.index]
                group[sequence.number] = Completion(
                    sequence.token_ids, sequence.logprobs, self.codec.decode(sequence.token_ids), truncated=not ended
                )
                if all(completion is not None for completion in group):
                    del done[sequence.prompt.index]
                    yield Group(sequence.prompt, [c for c in group if c is not None], self.version)
            if released:
                cache.reset(torch.tensor(released, device=self.device))
                free.extend(released)

    def _admit(
        self,
        cache: PolicyCache,
        prompts: list[Prompt],
        completions: int,
        sampling: Sampling,
        free: deque[int],
        running: dict[int, _Sequence],
    ) -> tuple[Tensor, list[int]]:
        """Read each prompt into one slot, copy that slot to the rest of its group. Returns logits [n * completions, vocab]."""
        slot_ids: list[int] = []
        for prompt in prompts:
            for number in range(completions):
                slot = free.popleft()
                slot_ids.append(slot)
                running[slot] = _Sequence(prompt, number, sequence_key(sampling.seed, prompt, number))
        firsts = slot_ids[::completions]
        ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=self.device)
        ends = torch.tensor([0] + [len(prompt.token_ids) for prompt in prompts], device=self.device).cumsum(0).int()
        logits = self.policy.prefill(cache, torch.tensor(firsts, device=self.device), ids, ends)
        if completions > 1:
            rest = [slot for i, slot in enumerate(slot_ids) if i % completions]
            sources = [first for first in firsts for _ in range(completions - 1)]
            cache.copy(torch.tensor(sources, device=self.device), torch.tensor(rest, device=self.device))
            logits = logits.repeat_interleave(completions, 0)
        return logits, slot_ids
