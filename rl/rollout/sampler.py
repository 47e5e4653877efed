"""Drawing tokens so that a draw depends on its own sequence alone, not on what else is in the batch.

One uniform number a (sequence, position), from a counter-based hash, chooses the token by inverse CDF. So one worker or
eight, 16 slots or 256, a fresh run or a resumed one: the same sequence sees the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from plumbline.rl.batch import Prompt, Sampling


def sequence_key(seed: int, prompt: Prompt, completion: int) -> int:
    """A 63-bit integer that names one sequence of one step."""
    name = f"{seed}/{prompt.key}/{prompt.epoch}/{prompt.sample_id}/{prompt.first_rollout + completion}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """splitmix64 of (key, position) as float64 in [0, 1).

    Args:
        keys: [B] int64 from sequence_key.
        positions: [B] int64, index of the token in its completion.

    Returns:
        [B] float64.
    """
    # The constants are splitmix64's, as signed 64-bit integers; torch's int64 product wraps as C's does.
    z = keys + (positions + 1) * -7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * (1.0 / (1 << 53))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits: Tensor, sampling: Sampling, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row.

    Args:
        logits: [B, vocab].
        sampling: temperature 0 takes the arg max; top_p below 1 keeps the smallest set of tokens with that mass.
        keys, positions: [B] int64, see uniforms.

    Returns:
        (tokens [B] int64, log-probability [B] float32 of each under softmax(logits / temperature), before top-p).
    """
    logits = logits.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    probabilities = logprobs.exp()
    u = uniforms(keys, positions)
    if sampling.top_p < 1:
        ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = torch.where(before < sampling.top_p, ordered, torch.zeros_like(ordered))
        tokens = order.gather(-1, _inverse_cdf(ordered, u)[:, None]).squeeze(-1)
    else:
        tokens = _inverse_cdf(probabilities, u)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    cdf = weights.double().cumsum(-1)
    index = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(-1)
    # u * total can round up to total itself; the last token with any weight is then meant.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)
