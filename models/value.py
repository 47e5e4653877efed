"""The critic of PPO: a policy's decoder with one number a token."""

from __future__ import annotations

from torch import Tensor, nn

from plumbline.models.policy import Policy


class ValueModel(nn.Module):
    """Value of the state after each token (GAE, arXiv 1506.02438).

    The decoder is its own, not shared with the actor: LIMR's recipe trains the two at different rates. The head starts
    at zero, so that the first advantages are the rewards alone.

    Args:
        policy: gives the decoder; its lm_head is not used. Pass a policy of its own (`load_policy` once more).

    Attributes:
        model: the decoder.
        value_head: Linear(hidden, 1).
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        weight = policy.model.embed_tokens.weight
        self.value_head = nn.Linear(policy.config.hidden_size, 1, dtype=weight.dtype, device=weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Packed input_ids [T], cu_seqlens [B+1] int32 -> values [T] float32."""
        return self.value_head(self.model.run(input_ids, cu_seqlens)).squeeze(-1).float()

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass (while in training mode)."""
        self.model.gradient_checkpointing = True
