"""Drawing the next token of every row on the device, and the bookkeeping of a decode step with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048


@dataclass
class State:
    """What a decode step keeps for each slot, all on the device.

    Attributes:
        tokens: [slots] int64, the newest token, which the next step reads.
        lengths: [slots] int64, tokens in the cache.
        counts: [slots] int64, tokens drawn.
        finished: [slots] int32, 1 once an end token came or the limit is reached; such a slot changes no more.
        keys: [slots] int64, see rl/rollout/sampler.py.
        drawn: [slots, limit] int64; logprobs: [slots, limit] float32.
        end_ids: [E] int64.
    """

    tokens: Tensor
    lengths: Tensor
    counts: Tensor
    finished: Tensor
    keys: Tensor
    drawn: Tensor
    logprobs: Tensor
    end_ids: Tensor


@triton.jit
def _shift(z, BITS: tl.constexpr):
    """Logical right shift of a signed 64-bit integer."""
    return (z >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _uniform(key, position):
    """splitmix64 of (key, position) in [0, 1), as rl/rollout/sampler.uniforms."""
    z = key + (position + 1) * -7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    return _shift(z, 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _chunk_stats(logits_ptr, top_ptr, sum_ptr, best_ptr, V, inverse, CHUNKS, SIZE: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = chunk * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits_ptr + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse
    top = tl.max(x, 0)
    # A chunk without a possible token has no finite maximum to subtract.
    mass = tl.sum(tl.exp(x - tl.where(top == float("-inf"), 0.0, top)), 0)
    tl.store(top_ptr + row * CHUNKS + chunk, top)
    tl.store(sum_ptr + row * CHUNKS + chunk, mass)
    tl.store(best_ptr + row * CHUNKS + chunk, chunk * SIZE + tl.argmax(x, 0))


@triton.jit
def _draw(
    logits_ptr, top_ptr, sum_ptr, best_ptr, slots_ptr, tokens_ptr, lengths_ptr, counts_ptr, finished_ptr, keys_ptr,
    drawn_ptr, logprobs_ptr, ends_ptr, V, inverse, CHUNKS, limit, width,
    SIZE: tl.constexpr, BC: tl.constexpr, ENDS: tl.constexpr, GREEDY: tl.constexpr, ADVANCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if tl.load(finished_ptr + slot) == 0:
        count = tl.load(counts_ptr + slot)
        b = tl.arange(0, BC)
        tops = tl.load(top_ptr + row * CHUNKS + b, mask=b < CHUNKS, other=float("-inf"))
        sums = tl.load(sum_ptr + row * CHUNKS + b, mask=b < CHUNKS, other=0.0)
        top = tl.max(tops, 0)
        masses = tl.where(sums > 0, sums * tl.exp(tops - top), 0.0)
        whole = tl.sum(masses, 0)
        if GREEDY:
            token = tl.load(best_ptr + row * CHUNKS + tl.argmax(tops, 0)).to(tl.int64)
        else:
            target = (_uniform(tl.load(keys_ptr + slot), count) * whole.to(tl.float64)).to(tl.float32)
            upto = tl.cumsum(masses, 0)
            last = tl.max(tl.where(masses > 0, b, 0), 0)
            chunk = tl.minimum(tl.sum((upto <= target).to(tl.int32), 0), last)
            before = tl.sum(tl.where(b < chunk, masses, 0.0), 0)
            o = tl.arange(0, SIZE)
            c = chunk * SIZE + o
            x = tl.load(logits_ptr + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32) * inverse
            weights = tl.exp(x - top)
            final = tl.max(tl.where(weights > 0, o, 0), 0)
            inside = tl.minimum(tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0), final)
            # The running sum may stop on a token of no weight next to the right one; the next with any is meant.
            inside = tl.min(tl.where((weights > 0) & (o >= inside), o, final), 0)
            token = (chunk * SIZE + inside).to(tl.int64)
        chosen = tl.load(logits_ptr + row * V + token).to(tl.float32) * inverse
        tl.store(logprobs_ptr + slot * width + count, chosen - top - tl.log(whole))
        tl.store(drawn_ptr + slot * width + count, token)
        tl.store(tokens_ptr + slot, token)
        tl.store(counts_ptr + slot, count + 1)
        if ADVANCE:
            tl.store(lengths_ptr + slot, tl.load(lengths_ptr + slot) + 1)
        ended = (count + 1 >= limit).to(tl.int32)
        for e in range(ENDS):
            ended = tl.maximum(ended, (tl.load(ends_ptr + e) == token).to(tl.int32))
        tl.store(finished_ptr + slot, ended)


def draw_tokens(logits: Tensor, slots: Tensor, state: State, *, temperature: float, limit: int, advance: bool) -> None:
    """Draw one token a row by inverse CDF and enter it into the state of the row's slot.

    Args:
        logits: [R, V] float of any precision, contiguous; the arithmetic is float32.
        slots: [R] int64, each slot at most once unless it is finished.
        state: see State; changed in place.
        temperature: 0 takes the arg max; log-probabilities are then those at temperature 1.
        limit: tokens of a completion at most.
        advance: the step also put a token into the cache.

    Raises:
        ValueError: limit is more than the state has room for.
    """
    if limit > state.drawn.shape[1]:
        raise ValueError(f"limit ({limit}) exceeds the room for drawn tokens ({state.drawn.shape[1]})")
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    tops, sums = (logits.new_empty(rows, chunks, dtype=torch.float32) for _ in range(2))
    best = logits.new_empty(rows, chunks, dtype=torch.int32)
    inverse = 1.0 / temperature if temperature > 0 else 1.0
    _chunk_stats[(rows, chunks)](logits, tops, sums, best, vocab, inverse, chunks, SIZE=CHUNK, num_warps=4)
    _draw[(rows,)](
        logits, tops, sums, best, slots, state.tokens, state.lengths, state.counts, state.finished, state.keys,
        state.drawn, state.logprobs, state.end_ids, vocab, inverse, chunks, limit, state.drawn.shape[1],
        SIZE=CHUNK, BC=triton.next_power_of_2(chunks), ENDS=len(state.end_ids), GREEDY=temperature == 0,
        ADVANCE=advance, num_warps=4,
    )  # fmt: skip
