"""Log-probability and entropy of chosen tokens, and the gradient of both, each in one pass over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _forward(x_ptr, target_ptr, logprob_ptr, entropy_ptr, lse_ptr, V, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    # Running maximum m, sum of exp(x - m), and sum of exp(x - m) x: enough for the normaliser and the entropy.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(x_ptr + row * V + first + c, mask=first + c < V, other=float("-inf")).to(tl.float32) * inverse
        higher = tl.maximum(top, x)
        # Lanes that have seen nothing finite yet keep a maximum of 0, so that no -inf is taken from -inf.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - safe)
        weight = tl.exp(x - safe)
        mass = mass * shrink + weight
        moment = moment * shrink + weight * tl.where(weight > 0, x, 0.0)
        top = higher
    whole_top = tl.max(top, 0)
    scale = tl.exp(top - whole_top)
    total = tl.sum(mass * scale, 0)
    lse = whole_top + tl.log(total)
    target = tl.load(target_ptr + row)
    chosen = tl.load(x_ptr + row * V + target).to(tl.float32) * inverse
    tl.store(logprob_ptr + row, chosen - lse)
    tl.store(entropy_ptr + row, lse - tl.sum(moment * scale, 0) / total)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _backward(
    x_ptr, target_ptr, lse_ptr, entropy_ptr, grad_ptr, entropy_grad_ptr, V, inverse,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < V
    x = tl.load(x_ptr + row * V + c, mask=ok, other=float("-inf")).to(tl.float32) * inverse
    log_p = x - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    grad = tl.load(grad_ptr + row)
    result = grad * (tl.where(c == tl.load(target_ptr + row), 1.0, 0.0) - p)
    if WITH_ENTROPY:
        # dH/dx = -p (log p + H)
        entropy = tl.load(entropy_ptr + row)
        result -= tl.load(entropy_grad_ptr + row) * tl.where(p > 0, p * (log_p + entropy), 0.0)
    tl.store(x_ptr + row * V + c, (result * inverse).to(x_ptr.dtype.element_ty), mask=ok)


def logprob_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits / temperature)[target], the entropy, and the log of the normaliser; arithmetic in float32.

    Args:
        logits: [N, V] contiguous, any float dtype; targets: [N] int64.

    Returns:
        (logprobs [N], entropy [N], normalisers [N]) float32, in nats.
    """
    rows, vocab = logits.shape
    out = [logits.new_empty(rows, dtype=torch.float32) for _ in range(3)]
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _forward[(rows,)](logits, targets, *out, vocab, 1 / temperature, BLOCK=block, num_warps=8)
    return out[0], out[1], out[2]


def logits_gradient_(
    logits: Tensor,
    targets: Tensor,
    normalisers: Tensor,
    entropy: Tensor,
    grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
) -> Tensor:
    """Gradient with respect to the logits, written over them.

    Args:
        logits: [N, V] contiguous; overwritten.
        targets, normalisers, entropy: as given to and by logprob_stats.
        grad: [N] float32, of the log-probabilities; entropy_grad: [N] float32 of the entropy, or None.

    Returns:
        logits, now the gradient [N, V].
    """
    rows, vocab = logits.shape
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _backward[(rows, triton.cdiv(vocab, block))](
        logits, targets, normalisers, entropy, grad, grad if entropy_grad is None else entropy_grad, vocab,
        1 / temperature, WITH_ENTROPY=entropy_grad is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return logits
