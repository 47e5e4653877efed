"""Completions of many lengths as packed sequences, cut into microbatches by a token budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from plumbline.models.policy import like_lengths
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.blocks import BlockCodec


@dataclass(frozen=True)
class Packed:
    """Some rows of a batch, ready for a forward pass.

    Attributes:
        rows: which, in order.
        ids: [T] int64, prompts and completions, each without its last token (nothing is predicted from it).
        cu_seqlens: [B+1] int32.
        predict: [N] int64, positions in T whose hidden state predicts a completion token.
        targets: [N] int64, those tokens.
        mask: [B, W] bool, True on completion tokens; W is the longest completion.
        blocks: [T, layers, Hkv, count] int32 that sparse attention is to take, or None.
    """

    rows: list[int]
    ids: Tensor
    cu_seqlens: Tensor
    predict: Tensor
    targets: Tensor
    mask: Tensor
    blocks: Tensor | None = None

    def spread(self, values: Tensor) -> Tensor:
        """One value a completion token [N] -> [B, W], zero on padding."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def pack(batch: TrainingBatch, rows: list[int], device: str, codec: BlockCodec | None = None) -> Packed:
    """Rows of a batch in one packed sequence, with the blocks to be replayed if there is a codec to read them."""
    ids: list[int] = []
    ends = [0]
    predict: list[int] = []
    targets: list[int] = []
    for row in rows:
        prompt, completion = batch.prompt_ids[row], batch.completion_ids[row]
        start = len(ids) + len(prompt) - 1
        predict += range(start, start + len(completion))
        targets += completion
        ids += prompt + completion[:-1]
        ends.append(len(ids))
    blocks = None
    if codec is not None:
        assert batch.blocks is not None
        parts = [
            codec.unpack(batch.blocks[row], last - first)
            for row, (first, last) in zip(rows, pairwise(ends), strict=True)
        ]
        blocks = torch.cat(parts).to(device)
    return Packed(
        rows,
        torch.tensor(ids, device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(predict, device=device),
        torch.tensor(targets, device=device),
        completion_mask([len(batch.completion_ids[row]) for row in rows], device),
        blocks,
    )


def completion_mask(lengths: list[int], device: str) -> Tensor:
    """[B, max(lengths)] bool, True on the first lengths[b] of row b."""
    return torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]


def padded(rows: list[list[float]], device: str) -> Tensor:
    """Lists of many lengths -> [B, longest] float32, zero beyond each one's end."""
    lengths = [len(row) for row in rows]
    flat = torch.tensor([value for row in rows for value in row], dtype=torch.float32, device=device)
    mask = completion_mask(lengths, device)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def microbatches(
    batch: TrainingBatch, rows: list[int], tokens_per_microbatch: int, *, one_pass: bool = False
) -> list[list[int]]:
    """Rows sorted by length (little padding for kernels that pad) and cut where the token budget is full.

    With `one_pass`, also where the decoder would pad them apart (models.policy.like_lengths): each part then passes every
    layer once.
    """
    length = {row: len(batch.prompt_ids[row]) + len(batch.completion_ids[row]) for row in rows}
    parts: list[list[int]] = []
    used = 0
    for row in sorted(rows, key=lambda row: (length[row], row)):
        if not parts or used + length[row] > tokens_per_microbatch:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += length[row]
    if one_pass:
        # A row is read without its last token; see pack.
        groups = [(part, like_lengths([length[row] - 1 for row in part])) for part in parts]
        parts = [[part[place] for place in group] for part, split in groups for group in split]
    return parts
