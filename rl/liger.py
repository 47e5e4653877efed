"""liger-kernel's fused norm, rotary embedding and SwiGLU inside a policy that trains on CUDA."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor

from plumbline.errors import InputError
from plumbline.models.attention import Attention, RMSNorm
from plumbline.models.policy import MLP, Policy


def use_liger(policy: Policy) -> None:
    """Swap the forward of the policy's norms, MLPs and projections, in place. Weights and their names stay.

    Raises InputError when liger-kernel is not installed or the policy is not on a GPU.
    """
    if policy.device.type != "cuda":
        raise InputError("learner.liger needs a GPU: its kernels are Triton's")
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError:
        raise InputError("learner.liger needs liger-kernel: pip install 'plumbline-rl[liger]'") from None
    forwards: dict[type, tuple[str, Any]] = {
        RMSNorm: ("forward", _norm),
        MLP: ("forward", _mlp),
    }
    for module in policy.modules():
        if isinstance(module, Attention):
            module.project = MethodType(_project, module)  # type: ignore[method-assign]
        elif type(module) in forwards:
            name, function = forwards[type(module)]
            setattr(module, name, MethodType(function, module))


def _norm(self: RMSNorm, x: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False, None)


def _mlp(self: MLP, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _project(self: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Attention.project with both rotations in one launch."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.dim)))
    k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.dim)))
    v = self.v_proj(x).unflatten(-1, (-1, self.dim))
    # liger's layout is [batch, heads, tokens, dim], with the packed tokens as one sequence here.
    q, k = (part[0].transpose(0, 1) for part in LigerRopeFunction.apply(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos.squeeze(1)[None], sin.squeeze(1)[None]
    ))  # fmt: skip
    return q, list(zip(k.split(self.kv_heads, 1), v.split(self.kv_heads, 1), strict=True))
