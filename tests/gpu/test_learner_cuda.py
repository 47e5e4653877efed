"""The learner on a GPU: fused log-probabilities and liger's layers give what plain PyTorch gives."""

import pytest
import torch

from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.liger import use_liger
from plumbline.rl.logprobs import token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("chunk", [100, 1000])
def test_fused_logprobs(bonus, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(333, 64, device="cuda", requires_grad=True)
    head = torch.nn.Linear(64, 49_152, bias=False, device="cuda")
    targets = torch.randint(0, 49_152, (333,), device="cuda")
    weights = torch.randn(333, device="cuda")
    results = []
    for backend in ("torch", "triton"):
        logprobs, entropy = token_logprobs(
            hidden, targets, head, temperature=0.8, chunk_tokens=chunk, entropy_gradient=bonus, backend=backend
        )
        loss = (logprobs * weights).sum() + (entropy * weights.flip(0)).sum() * bonus
        results.append([logprobs, entropy, *torch.autograd.grad(loss, [hidden, head.weight])])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"attention": "nsa", "nsa": {"window": 32}}], ids=str)
def test_liger_changes_only_the_speed(shape):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 32}
    policy = Policy(PolicyConfig(**sizes, **shape)).cuda()
    ids = torch.randint(0, 500, (90,), device="cuda")
    ends = torch.tensor([0, 20, 90], dtype=torch.int32, device="cuda")
    results = []
    for _ in range(2):
        policy.zero_grad()
        logits = policy(ids, ends)
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad.clone() for parameter in policy.parameters())])
        use_liger(policy)
    for plain, fused in zip(*results, strict=True):
        assert (fused - plain).norm() <= 2e-3 * plain.norm() + 1e-7
