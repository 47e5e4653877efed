"""What a policy makes of long contexts: its loss by position, whether it finds a needle in a haystack, and how much of
exact attention its choice of blocks holds."""

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

from plumbline.models.adapt import observed
from plumbline.models.attention import Seen, SparseAttention
from plumbline.models.layerwise import chosen_blocks, mass_and_importance
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
    """One question: token ids of text, needle and question, then those of the answer. The needle is prompt[start:stop]."""

    prompt: Tensor
    answer: Tensor
    depth: float
    start: int
    stop: int


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
        prompt = torch.cat([hay[:cut], needle, hay[cut:], question])
        made.append(Needle(prompt, answer, depth, cut, cut + len(needle)))
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


@torch.no_grad()
def block_choices(
    policy: Policy, ids: Tensor, positions: Tensor, *, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What exact attention would give each selection block, and which blocks are chosen, as the policy runs.

    Args:
        policy: with NSA attention.
        ids: [L] int64, one sequence; positions: [m] int64, the queries looked at.

    Returns:
        mass [layers, Hkv, m, S] float32, of exact attention over the selected branch's keys, the mean over the group;
        chosen and best, bool of that shape: the blocks chosen, and those that choosing by mass would take.
    """
    if policy.config.attention != "nsa":
        raise ValueError("full attention chooses no blocks")
    ids, positions = ids.to(policy.device), positions.to(policy.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(layer: SparseAttention, seen: Seen) -> None:
        with torch.autocast(ids.device.type, enabled=False):
            mass, importance = mass_and_importance(seen.q, seen.k_cmp, seen.k_slc, layer, seen.layout, positions)
            chosen, best = (chosen_blocks(scores, positions, layer.nsa) for scores in (importance, mass))
        parts.append((mass[0] / (layer.heads // layer.kv_heads), chosen[0], best[0]))

    ends = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
    with observed(policy, look), _cast(policy, autocast):
        policy.hidden_states(ids, ends)
    mass, chosen, best = (torch.stack(part) for part in zip(*parts, strict=True))
    return mass, chosen, best


def attention_recall(
    policy: Policy, rows: Tensor, *, queries: int = 64, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Share of exact attention's mass that the chosen blocks hold, beyond the tokens that selection reaches anyway.

    Args:
        rows: [N, L] windows; queries: evenly spaced positions of each.

    Returns:
        Recall of the blocks chosen, and of the best choice there is, both [N, layers] float32 on the CPU.

    Raises:
        ValueError: full attention, or windows that selection reaches whole.
    """
    config, length = policy.config.nsa_config, rows.shape[1]
    reach = config.count * config.select_block
    if length <= reach:
        raise ValueError(f"selection reaches {reach} tokens; recall needs windows longer than {length}")
    positions = torch.linspace(reach, length - 1, queries).long()
    found = []
    for row in rows:
        mass, *choices = block_choices(policy, row, positions, autocast=autocast)
        found.append(torch.stack([(mass * choice).sum(-1).mean((1, 2)) for choice in choices]).cpu())
    chosen, best = torch.stack(found).unbind(1)
    return chosen, best


@dataclass(frozen=True)
class NeedleRecall:
    """How the queries that give the answer see the needle's blocks, all [n, layers] float32 on the CPU.

    Attributes:
        mass: of exact attention on them, the mean over heads and queries.
        held: the part of it in blocks chosen; best: in the best choice.
        chosen: share of kv heads, queries and blocks of the needle in which the block is chosen.
    """

    mass: Tensor
    held: Tensor
    best: Tensor
    chosen: Tensor


def needle_recall(policy: Policy, questions: Sequence[Needle], *, autocast: torch.dtype | None = None) -> NeedleRecall:
    """Whether sparse attention chooses the blocks with the needle; raises as block_choices."""
    size = policy.config.nsa_config.select_block
    parts = []
    for question in questions:
        row = torch.cat([question.prompt, question.answer])
        positions = torch.arange(len(question.prompt) - 1, len(row) - 1)
        blocks = slice(question.start // size, (question.stop - 1) // size + 1)
        mass, chosen, best = (x[..., blocks] for x in block_choices(policy, row, positions, autocast=autocast))
        held = [(mass * choice).sum(-1).mean((1, 2)) for choice in (torch.ones_like(chosen), chosen, best)]
        parts.append(torch.stack([*held, chosen.float().mean((1, 2, 3))]).cpu())
    return NeedleRecall(*torch.stack(parts).unbind(1))
