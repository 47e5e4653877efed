"""The native engine: continuous batching over cache slots, with log-probabilities. Runs NSA and full attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plumbline.models.load import load_policy
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.blocks import BlockCodec
from plumbline.rl.rollout import absolute_sum
from plumbline.rl.rollout.sampler import draw, sequence_key

if TYPE_CHECKING:
    from plumbline.models.cache import PolicyCache
    from plumbline.rl.rollout.graphed import Decoder
    from plumbline.rl.text import Codec

# Tokens that prompts are read in at once.
PREFILL_TOKENS = 65_536
# Steps between two looks at which sequences have ended; a look makes the host wait for the device.
STEPS_PER_LOOK = 16
# A decoder's cache is made a multiple of this long, so that the next batch's prompts find it long enough.
LENGTH_STEP = 128


@dataclass
class _Sequence:
    """One completion under way."""

    prompt: Prompt
    number: int
    key: int
    versions: list[list[int]]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # Of the prompt, then of each token: [n, layers, Hkv, count] from the codec's first position on.
    blocks: list[Tensor] = field(default_factory=list)


class NativeEngine:
    """Answers prompts with the policy at `path`.

    A prompt is read once and its cache copied to its group's slots. Finished sequences free their slot; the next prompt
    moves in as soon as a whole group fits. On CUDA a step is a captured graph that draws its tokens on the device
    (graphed.py); elsewhere it is one call a step.

    Args:
        path: see load_policy.
        attention: see load_policy.
        codec: turns token ids into text and knows the end token.
        slots: sequences decoded at once.
        device: torch device string.
        dtype: of weights and cache.
    """

    def __init__(
        self,
        path: str,
        *,
        attention: str | None,
        codec: Codec,
        slots: int,
        device: str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.policy = load_policy(path, attention=attention, dtype=dtype, device=device)
        self.policy.requires_grad_(False).eval()
        self.codec = codec
        self.slots = slots
        self.device = device
        self.version = 0
        self.on_device = device.startswith("cuda")
        self.decoder: Decoder | None = None
        self.blocks = BlockCodec(self.policy.config) if self.policy.config.attention == "nsa" else None

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
        """absolute_sum of the weights."""
        return absolute_sum(self.policy.parameters())

    def sleep(self) -> None:
        """Leave the GPU to others: weights to the host, cache and graphs dropped."""
        self.decoder = None
        module: torch.nn.Module = self.policy
        module.to("cpu")
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Back to the device."""
        module: torch.nn.Module = self.policy
        module.to(self.device)

    def generate(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group]:
        """Yield each prompt's group once its last completion has ended.

        Args:
            prompts: non-empty token ids each.
            completions: how many of each prompt.
            sampling: see Sampling.

        Raises:
            ValueError: record_blocks with full attention.
        """
        parts = self.generate_in_parts(prompts, completions, sampling)
        yield from (group for group in parts if group is not None)

    def generate_in_parts(self, prompts: list[Prompt], completions: int, sampling: Sampling) -> Iterator[Group | None]:
        """As `generate`, with None in between: there load_weights may be called.

        Completions under way are then carried on by the new weights, over a cache that they have computed anew; each
        token's log-probability stays that of the weights which drew it, and Completion.versions says which those were.
        """
        if not prompts:
            return
        if sampling.record_blocks and self.blocks is None:
            raise ValueError("full attention chooses no blocks that could be recorded")
        # The device sampler has no top-p, which only evaluation asks for, and keeps no blocks.
        captured = self.on_device and sampling.top_p == 1 and not sampling.record_blocks
        loop = self._generate_on_device if captured else self._generate_step_by_step
        yield from loop(prompts, completions, sampling)

    @torch.no_grad()
    def _generate_on_device(
        self, prompts: list[Prompt], completions: int, sampling: Sampling
    ) -> Iterator[Group | None]:
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        decoder = self._decoder(max(self.slots, completions), longest, sampling)
        free = deque(range(decoder.slots))
        waiting = deque(prompts)
        running: dict[int, _Sequence] = {}
        done: dict[int, list[Completion | None]] = {prompt.index: [None] * completions for prompt in prompts}
        ended: list[_Sequence] = []
        version = self.version
        while waiting or running:
            if version != self.version:
                version = self.version
                self._carry_on(decoder.cache, running, decoder.drawn(list(running)))
            while waiting and len(free) >= completions:
                admitted: list[Prompt] = []
                tokens = 0
                while waiting and len(free) >= completions * (len(admitted) + 1):
                    tokens += len(waiting[0].token_ids)
                    if admitted and tokens > PREFILL_TOKENS:
                        break
                    admitted.append(waiting.popleft())
                logits, slot_ids = self._admit(decoder.cache, admitted, completions, sampling, free, running)
                keys = torch.tensor([running[slot].key for slot in slot_ids], device=self.device)
                decoder.begin(torch.tensor(slot_ids, device=self.device), keys, logits)
            decoder.advance(list(running), STEPS_PER_LOOK)
            # While the device takes these steps, the host has what ended in those before: its texts are made, and whoever
            # asked does what he does with a group.
            yield from self._finish_all(ended, done)
            ended = []
            for slot, token_ids, logprobs in decoder.ended(list(running)):
                sequence = running.pop(slot)
                sequence.token_ids, sequence.logprobs = token_ids, logprobs
                free.append(slot)
                ended.append(sequence)
            yield None
        yield from self._finish_all(ended, done)

    def _decoder(self, slots: int, longest: int, sampling: Sampling) -> Decoder:
        """The decoder of the last call, if this one's batch fits it."""
        from plumbline.rl.rollout.graphed import Decoder

        kept = self.decoder
        if (
            kept is not None
            and kept.slots == slots
            and kept.cache.max_length >= longest
            and kept.limit == sampling.max_new_tokens
            and kept.temperature == sampling.temperature
        ):
            return kept
        self.decoder = kept = None  # its cache must be gone before the next is made
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        self.decoder = Decoder(
            self.policy, slots, length, sampling.max_new_tokens, sorted(self.codec.end_ids), sampling
        )
        return self.decoder

    @torch.no_grad()
    def _generate_step_by_step(
        self, prompts: list[Prompt], completions: int, sampling: Sampling
    ) -> Iterator[Group | None]:
        slots = max(self.slots, completions)
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        cache = self.policy.new_cache(min(slots, completions * len(prompts)), longest)
        free = deque(range(min(slots, completions * len(prompts))))
        waiting = deque(prompts)
        running: dict[int, _Sequence] = {}
        done: dict[int, list[Completion | None]] = {prompt.index: [None] * completions for prompt in prompts}
        tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)
        version = self.version

        while waiting or running:
            if version != self.version:
                version = self.version
                self._carry_on(cache, running, {slot: sequence.token_ids for slot, sequence in running.items()})
            admitted: list[Prompt] = []
            while waiting and len(free) - completions * len(admitted) >= completions:
                admitted.append(waiting.popleft())
            if admitted:
                logits, advanced = self._admit(cache, admitted, completions, sampling, free, running)
            else:
                advanced = list(running)
                slot_tensor = torch.tensor(advanced, device=self.device)
                record = self.policy.new_record(len(advanced)) if sampling.record_blocks else None
                logits = self.policy.decode(cache, slot_tensor, tokens[slot_tensor], record=record)
                if record is not None:
                    self._keep_blocks(record, [running[slot] for slot in advanced])
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
                if token not in self.codec.end_ids and len(sequence.token_ids) < sampling.max_new_tokens:
                    continue
                released.append(slot)
                yield from self._finish_all([running.pop(slot)], done)
            if released:
                cache.reset(torch.tensor(released, device=self.device))
                free.extend(released)
            yield None

    def _carry_on(self, cache: PolicyCache, running: dict[int, _Sequence], drawn: dict[int, list[int]]) -> None:
        """New weights go on with the sequences under way: they read each prompt and what was drawn so far, except the
        last token, which the next step reads."""
        waiting = deque(running.items())
        while waiting:
            slots: list[int] = []
            ids: list[int] = []
            ends = [0]
            while waiting and (not slots or len(ids) + len(waiting[0][1].prompt.token_ids) <= PREFILL_TOKENS):
                slot, sequence = waiting.popleft()
                sequence.versions.append([len(drawn[slot]), self.version])
                slots.append(slot)
                ids += sequence.prompt.token_ids + drawn[slot][:-1]
                ends.append(len(ids))
            where = torch.tensor(slots, device=self.device)
            cache.reset(where)
            ends_tensor = torch.tensor(ends, dtype=torch.int32, device=self.device)
            self.policy.prefill(cache, where, torch.tensor(ids, device=self.device), ends_tensor)

    def _finish_all(self, sequences: list[_Sequence], done: dict[int, list[Completion | None]]) -> Iterator[Group]:
        """Groups whose last completion is among these."""
        for sequence in sequences:
            group = self._finish(sequence, done)
            if group is not None:
                yield group

    def _finish(self, sequence: _Sequence, done: dict[int, list[Completion | None]]) -> Group | None:
        """Enter a completion; its group, if it was the last."""
        ended = sequence.token_ids[-1] in self.codec.end_ids
        group = done[sequence.prompt.index]
        text = self.codec.decode(sequence.token_ids)
        blocks = self.blocks.pack(torch.cat(sequence.blocks)) if self.blocks and sequence.blocks else b""
        group[sequence.number] = Completion(
            sequence.token_ids, sequence.logprobs, text, not ended, blocks, sequence.versions
        )
        whole = [completion for completion in group if completion is not None]
        if len(whole) < len(group):
            return None
        del done[sequence.prompt.index]
        return Group(sequence.prompt, whole, min(completion.versions[0][1] for completion in whole))

    def _keep_blocks(self, record: Tensor, sequences: list[_Sequence]) -> None:
        """Rows of a decode step, each the last drawn token of its sequence."""
        assert self.blocks is not None
        for row, sequence in zip(record, sequences, strict=True):
            if len(sequence.prompt.token_ids) + len(sequence.token_ids) > self.blocks.first:
                sequence.blocks.append(row[None])

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
                key = sequence_key(sampling.seed, prompt, number)
                running[slot] = _Sequence(prompt, number, key, [[0, self.version]])
        firsts = slot_ids[::completions]
        ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=self.device)
        ends = torch.tensor([0] + [len(prompt.token_ids) for prompt in prompts], device=self.device).cumsum(0).int()
        record = self.policy.new_record(len(ids)) if sampling.record_blocks else None
        logits = self.policy.prefill(cache, torch.tensor(firsts, device=self.device), ids, ends, record=record)
        if record is not None and self.blocks is not None:
            for slot, (first, last) in zip(firsts, pairwise(ends.tolist()), strict=True):
                for member in slot_ids[slot_ids.index(slot) :][:completions]:
                    running[member].blocks = [record[first + self.blocks.first : last]]
        if completions > 1:
            rest = [slot for i, slot in enumerate(slot_ids) if i % completions]
            sources = [first for first in firsts for _ in range(completions - 1)]
            cache.copy(torch.tensor(sources, device=self.device), torch.tensor(rest, device=self.device))
            logits = logits.repeat_interleave(completions, 0)
        return logits, slot_ids
