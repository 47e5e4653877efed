"""Sparse attention in captured decode steps: a graph gives what the same kernels give one by one."""

import pytest
import torch

from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.batch import Sampling
from plumbline.rl.rollout.graphed import Decoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [700, 33, 1, 260, 90]
SLOTS, LONGEST, LIMIT = len(PROMPTS), 1024, 80


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def policy(request) -> Policy:
    torch.manual_seed(0)
    config = PolicyConfig(
        vocab_size=3000,
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=64,
        attention="nsa",
        nsa={"block": 16, "stride": 8, "select_block": 16, "count": 6, "window": 64},
        initializer_range=0.08,
    )
    return Policy(config).to("cuda", request.param).eval().requires_grad_(False)


@torch.no_grad()
def begun(policy, temperature):
    decoder = Decoder(policy, SLOTS, LONGEST, LIMIT, [7], Sampling(LIMIT, temperature))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, 3000, (sum(PROMPTS),), generator=generator).cuda()
    ends = torch.tensor([0, *PROMPTS]).cumsum(0).int().cuda()
    slots = torch.arange(SLOTS, device="cuda")
    decoder.begin(slots, 100 + slots, policy.prefill(decoder.cache, slots, ids, ends))
    return decoder


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_steps_are_the_kernels_one_by_one(policy, temperature):
    captured, eager = begun(policy, temperature), begun(policy, temperature)
    # 1, then 2 blocks of steps: graphs are replayed while compression and selection blocks are completed.
    for steps in (1, 40, LIMIT):
        captured.advance(list(range(SLOTS)), steps)
        width = next(width for width in eager.rows if width >= SLOTS)
        eager.rows[width].copy_(torch.tensor([*range(SLOTS), *[SLOTS] * (width - SLOTS)]))
        for _ in range(steps):
            eager.run(width)
        torch.cuda.synchronize()
        assert torch.equal(captured.state.counts[:SLOTS], eager.state.counts[:SLOTS])
        assert torch.equal(captured.state.drawn[:SLOTS], eager.state.drawn[:SLOTS])
        torch.testing.assert_close(captured.state.logprobs[:SLOTS], eager.state.logprobs[:SLOTS], rtol=0, atol=0)
        assert torch.equal(captured.cache.lengths[:SLOTS], eager.cache.lengths[:SLOTS])
    assert captured.graphs
    assert len(captured.ended(list(range(SLOTS)))) == SLOTS


@torch.no_grad()
def test_one_graph_serves_every_length(policy):
    """Made at short lengths, replayed at long ones, against the step whose plan is for the lengths at hand; in float32
    also against the policy's own layers (in bfloat16 those take angles in bfloat16, and may choose other blocks)."""
    decoder = begun(policy, 0.0)
    rows = torch.arange(SLOTS, device="cuda")
    for length in (1, 15, 16, 17, 250, 900):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(8, 3000, (SLOTS * length,), generator=generator).cuda()
        ends = (torch.arange(SLOTS + 1) * length).int().cuda()
        decoder.begin(rows, rows, policy.prefill(decoder.cache, rows, ids, ends))
        tokens = decoder.state.tokens.clone()
        decoder.advance(list(range(SLOTS)), 1)
        [width] = decoder.graphs
        drawn = decoder.state.drawn[rows, 1]
        same = decoder.state.finished[rows] == 0  # one that drew an end token at once took no step
        other = policy.new_cache(SLOTS + 1, length + 1)
        policy.prefill(other, rows, ids, ends)
        wanted = [decoder.step(other, decoder.rows[width], tokens[decoder.rows[width]])[:SLOTS]]
        if policy.dtype == torch.float32:
            policy.prefill(other, rows, ids, ends)
            wanted.append(policy.decode(other, rows, tokens[rows]))
        for want in wanted:
            found = torch.log_softmax(want.float(), -1)
            best = found.max(-1).values
            chosen = found.gather(1, drawn[:, None])[:, 0]
            assert (chosen >= best - 2e-2)[same].all()
            torch.testing.assert_close(decoder.state.logprobs[rows, 1][same], chosen[same], rtol=2e-2, atol=2e-2)
    assert len(decoder.graphs) == 1
