"""The least that a step's work must cost on a card: bytes at the rate of a copy, floating-point operations at that of a
large matrix product, whichever takes longer.

Counted is what the mathematics needs, each operand once. Not counted: logits and activations on their way through
memory, padding, recomputation, launches, the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rates:
    """Of a card, a second.

    Attributes:
        flops: of a large bfloat16 matrix product.
        copied: bytes of a large copy, read and written counted.
    """

    flops: float
    copied: float

    @classmethod
    def measure(cls) -> Rates | None:
        """Of this card; None without one."""
        if not torch.cuda.is_available():
            return None
        from benchmarks.nsa import rates

        made = cls(*rates())
        torch.cuda.empty_cache()
        return made


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations."""

    bytes: float
    flops: float

    def seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.copied, self.flops / rates.flops)

    def shown(self, rates: Rates, measured: float) -> dict[str, float]:
        floor = self.seconds(rates)
        return {
            "bytes": self.bytes,
            "flops": self.flops,
            "floor_seconds": floor,
            "seconds": measured,
            "share": floor / measured,
        }


@dataclass(frozen=True)
class Shape:
    """A decoder with full attention, in numbers.

    Attributes:
        body: weights of the layers' matrices.
        head: of the output matrix.
        parameters: all that are trained; norms and biases left out.
        query_width, kv_width: heads times head dimension.
    """

    body: int
    head: int
    parameters: int
    layers: int
    query_width: int
    kv_width: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a PolicyConfig."""
        hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        query = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        body = layers * (hidden * (2 * query + 2 * kv) + 3 * hidden * wide)
        head = config.vocab_size * hidden
        embeddings = head * (1 if config.tie_word_embeddings else 2)
        return cls(body, head, body + embeddings, layers, query, kv)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers, bfloat16."""
        return 2 * 2 * self.kv_width * self.layers

    def pair_flops(self, pairs: float) -> float:
        """Scores and weighted sums of so many (query token, key token) pairs, all layers."""
        return 4 * self.query_width * self.layers * pairs


def decode_step(shape: Shape, lengths: list[int]) -> Work:
    """One token more for sequences with so many tokens in the cache: weights once, every cached key and value once."""
    rows, cached = len(lengths), sum(lengths)
    return Work(
        2 * (shape.body + shape.head) + (cached + rows) * shape.token_bytes,
        2 * (shape.body + shape.head) * rows + shape.pair_flops(cached + rows),
    )


def rollout(shape: Shape, prompts: list[int], completions: list[list[int]]) -> Work:
    """Prompts read once, then every completion token by token, all sequences side by side.

    Args:
        prompts: tokens of each.
        completions: tokens of each of its completions.
    """
    # The last token that is drawn enters no cache, and the first comes from the prompt's own logits.
    steps = max(n for group in completions for n in group) - 1
    rows = sum(n - 1 for group in completions for n in group)
    pairs = sum(p * (n - 1) + (n - 1) * n / 2 for p, group in zip(prompts, completions, strict=True) for n in group)
    read = sum(prompts)
    return Work(
        # A new token is written; a pair of it with itself needs no read.
        2 * (shape.body + shape.head) * (steps + 1) + (pairs + read) * shape.token_bytes,
        2 * shape.body * (read + rows)
        + 2 * shape.head * (rows + sum(len(group) for group in completions))
        + shape.pair_flops(pairs + sum(p * (p + 1) / 2 for p in prompts)),
    )


def update(shape: Shape, rows: list[tuple[int, int]]) -> Work:
    """Forward and backward over sequences, and one AdamW step in float32.

    Args:
        rows: (prompt tokens, completion tokens) of each sequence that has a gradient.
    """
    tokens = sum(p + n - 1 for p, n in rows)
    predicted = sum(n for _, n in rows)
    pairs = sum((p + n - 1) * (p + n) / 2 for p, n in rows)
    return Work(
        # Read: weights, gradients, two moments; written: weights and moments.
        7 * 4 * shape.parameters,
        # Backward is twice the forward for a matrix, 2.5 times for attention, whose scores are made again.
        6 * shape.body * tokens + 6 * shape.head * predicted + 3.5 * shape.pair_flops(pairs),
    )
