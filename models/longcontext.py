"""What a policy makes of long contexts: its loss by position, and whether it finds a needle in a haystack."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor

from plumbline.models.policy import Policy

CITIES = [
    "Amsterdam",
    "Barcelona",
    "Cairo",
    "Dublin",
    "Edinburgh",
    "Florence",
    "Geneva",
    "Helsinki",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lisbon",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Prague",
    "Quito",
    "Rome",
    "Sydney",
    "Tokyo",
    "Utrecht",
    "Vienna",
    "Warsaw",
    "Zurich",
]
LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent parts with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """values [n] float; Student's t. With n = 1 the interval is unknown (NaN)."""
        n = values.numel()
        mean = values.double().mean().item()
        half = student.ppf(0.975, n - 1) * values.double().std().item() / math.sqrt(n) if n > 1 else math.nan
        return cls(mean, mean - half, mean + half, n)

    @classmethod
    def of_share(cls, hits: int, n: int) -> Estimate:
        """Wilson's interval of a proportion."""
        z = 1.96
        share, centre = hits / n, (hits + z * z / 2) / (n + z * z)
        half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
        return cls(share, max(0.0, centre - half), min(1.0, centre + half), n)


def read_tokens(files: Iterable[Path], tokenizer: Any) -> list[Tensor]:
    """Each UTF-8 text file as token ids [n] int64.

    Raises:
        FileNotFoundError: no such file. ValueError: no text in it, or not UTF-8.
    """
    texts = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no text file {file}")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"{file} holds no text")
        texts.append(torch.tensor(ids))
    return texts


def windows(texts: Sequence[Tensor], length: int, limit: int | None = None) -> Tensor:
    """Non-overlapping windows [N, length] of the texts, the first `limit` of them. ValueError: no text is that long."""
    rows = [text[: len(text) // length * length].view(-1, length) for text in texts]
    whole = torch.cat(rows) if rows else torch.empty(0, length)
    if not len(whole):
        raise ValueError(f"no text has {length} tokens; give longer ones or a shorter context")
    return whole[:limit]


def _cast(policy: Policy, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(policy.device.type, dtype, enabled=dtype is not None)


@torch.no_grad()
def token_losses(policy: Policy, rows: Tensor, *, autocast: torch.dtype | None = None) -> Tensor:
    """Loss (nats) of each token given those before it.

    Args:
        policy: in evaluation mode.
        rows: [N, L] int64, each read by itself.
        autocast: dtype of the matrix products, None: the policy's own.

    Returns:
        [N, L - 1] float32 on the CPU; column t is the loss of token t + 1.
    """
    losses = []
    for row in rows:
        ids = row.to(policy.device)
        ends = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
        with _cast(policy, autocast):
            hidden = policy.hidden_states(ids, ends)
            parts = [
                F.cross_entropy(policy.lm_head(part).float(), target, reduction="none")
                for part, target in zip(hidden[:-1].split(LOGIT_ROWS), ids[1:].split(LOGIT_ROWS), strict=True)
            ]
        losses.append(torch.cat(parts).cpu())
    return torch.stack(losses)


@dataclass(frozen=True)
class Needle:
    """One question: token ids of text, needle and question, then those of the answer."""

    prompt: Tensor
    answer: Tensor
    depth: float


def needles(
    texts: Sequence[Tensor],
    tokenizer: Any,
    length: int,
    count: int,
    *,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
) -> list[Needle]:
    """A city's number hidden in real text (the single-needle task of RULER, arXiv 2404.06654).

    Args:
        texts: token ids of the haystack's texts; longer than `length` in all.
        tokenizer: the policy's.
        length: tokens of prompt and answer together.
        count: questions, spread evenly over depths.
        depths: place of the needle as a share of the haystack.
        seed: decides cities, numbers and the place in the texts.
    """
    stream = torch.cat(list(texts))
    rng = random.Random(seed)

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    made = []
    for number in range(count):
        city, value = rng.choice(CITIES), str(rng.randrange(10**6, 10**7))
        needle = encode(f"\nThe special magic number for {city} is {value}.\n")
        question = encode(f"\nWhat is the special magic number for {city}?\nThe special magic number for {city} is")
        answer = encode(f" {value}")
        room = length - len(needle) - len(question) - len(answer)
        if room < 1 or len(stream) <= room:
            raise ValueError(f"a haystack of {length} tokens needs more text ({len(stream)} tokens) or more room")
        start = rng.randrange(len(stream) - room)
        hay = stream[start : start + room]
        depth = depths[number % len(depths)]
        cut = round(depth * room)
        made.append(Needle(torch.cat([hay[:cut], needle, hay[cut:], question]), answer, depth))
    return made


@torch.no_grad()
def find_needles(
    policy: Policy, questions: Sequence[Needle], *, autocast: torch.dtype | None = None, tokens_at_once: int = 65_536
) -> tuple[Tensor, Tensor]:
    """Whether greedy decoding would give each answer, and the answer's loss.

    One pass over prompt and answer decides both: greedy decoding gives the answer exactly if each of its tokens is the
    most probable one after those before it.

    Returns:
        (found [n] bool, loss [n] float32 nats a token), on the CPU.
    """
    found, losses = [], []
    longest = max(len(question.prompt) + len(question.answer) for question in questions)
    together = max(1, tokens_at_once // longest)
    for first in range(0, len(questions), together):
        group = questions[first : first + together]
        rows = [torch.cat([question.prompt, question.answer]) for question in group]
        ends = F.pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0))
        with _cast(policy, autocast):
            packed = policy.hidden_states(torch.cat(rows).to(policy.device), ends.int().to(policy.device))
            for question, end in zip(group, ends[1:].tolist(), strict=True):
                logits = policy.lm_head(packed[end - len(question.answer) - 1 : end - 1]).float().cpu()
                found.append(bool((logits.argmax(-1) == question.answer).all()))
                losses.append(F.cross_entropy(logits, question.answer).item())
    return torch.tensor(found), torch.tensor(losses)
