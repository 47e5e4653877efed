"""What a sparse policy learns from the dense one it was made of.

Plain prose seldom makes a query look far back for one particular token, which is what sparse attention loses first. So
windows are planted with passages that repeat earlier ones of the same window (`plant_repeats`): there the dense policy
retrieves, and its attention and its distribution say from where and what. They are the targets, so that a policy does not
learn to expect repeats where the dense one does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from plumbline.models.config import PolicyConfig
from plumbline.models.load import fill, has_branches
from plumbline.models.policy import Policy

LOGIT_ROWS = 4096


def plant_repeats(
    windows: Tensor, share: float, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Windows with passages that repeat earlier ones.

    Args:
        windows: [N, L] int64 token ids, left as they are.
        share: of a window that repeats, as far as there is room after a first passage.
        length: tokens of a passage, which begins at the same places of each window; what it repeats is drawn for each, from
            all that lies before it.
        generator: of the CPU.

    Returns:
        The planted windows [N, L]; the positions [m] int64, ascending, whose next token repeats one that followed the
        same token earlier: all of a passage but its last.
    """
    count, total = windows.shape
    offset = int(torch.randint(length, (), generator=generator))
    places = (total - offset) // length - 1
    wanted = min(places, round(share * total / length))
    if wanted < 1 or length < 2:
        return windows, torch.empty(0, dtype=torch.int64)
    starts = offset + length * (1 + torch.randperm(places, generator=generator)[:wanted].sort().values)
    planted, within = windows.clone(), torch.arange(length)
    for start in starts.tolist():
        source = torch.randint(start - length + 1, (count, 1), generator=generator)
        planted[:, start : start + length] = planted.gather(1, source + within)
    return planted, (starts[:, None] + within[:-1]).flatten()


@torch.no_grad()
def dense_policy(policy: Policy) -> Policy:
    """The dense policy that a fresh conversion was made of, read from its selected branch: a frozen copy."""
    with torch.device("meta"):
        dense = Policy(PolicyConfig(**{**policy.config.to_dict(), "attention": "full", "nsa": None}))
    tensors = policy.state_dict()
    parameters = {
        name: (tensors[name].chunk(3)[1] if has_branches(name) else tensors[name]).clone()
        for name, _ in dense.named_parameters()
    }
    return fill(dense, parameters).requires_grad_(False)


def sum_over_rows(part: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The sum of part(rows of each tensor), some rows at a time, made again in the backward pass: logits are large."""
    rows = zip(*(tensor.split(LOGIT_ROWS) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(part, *some, use_reentrant=False) for some in rows]).sum()


def divergence_from(teacher: Policy, policy: Policy, wanted: Tensor, hidden: Tensor) -> Tensor:
    """KL divergence (nats) from the teacher's next-token distributions to the policy's, summed over tokens.

    Args:
        wanted, hidden: [T, hidden] of the teacher (without gradient) and of the policy, after the final norm.
    """

    def part(target: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            p = torch.log_softmax(teacher.lm_head(target).float(), -1)
        q = torch.log_softmax(policy.lm_head(rows).float(), -1)
        return F.kl_div(q, p, reduction="sum", log_target=True)

    return sum_over_rows(part, wanted, hidden)
