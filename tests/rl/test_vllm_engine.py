"""vLLM as a rollout engine, run for real on the CPU: log-probabilities, new weights, stopping, seeds. Skipped without vLLM."""

import pytest
import torch

from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy
from plumbline.rl.batch import Prompt, Sampling, TrainingBatch
from plumbline.rl.logprobs import token_logprobs
from plumbline.rl.packing import pack
from plumbline.rl.rollout import absolute_sum
from plumbline.rl.rollout.native import NativeEngine
from plumbline.rl.rollout.vllm import VLLMEngine

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

NSA = {"block": 8, "stride": 4, "select_block": 8, "count": 4, "window": 16}
VOCAB, END = 97, 5
ENGINE = {"slots": 8, "max_length": 128, "dtype": torch.float32}


class Words:
    """A codec of nothing but numbers."""

    end_ids = frozenset([END])

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def random_policy(attention: str, tied: bool, seed: int) -> Policy:
    torch.manual_seed(seed)
    config = PolicyConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention=attention,
        nsa=NSA,
        qkv_bias=True,
        initializer_range=0.15,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=7,  # vLLM is not to stop at it: the codec's end token is another
        bos_token_id=None,
    )
    return Policy(config).float().eval()


def new_engine(folder, **changes):
    settings = {**ENGINE, "attention": None, "memory_share": 0.2, "seed": 0, "sleeps": False, **changes}
    return VLLMEngine(str(folder), codec=Words(), **settings)


def prompts_of(*lengths, first_rollout=0):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(i, str(i), tokens, "", "", key=3, first_rollout=first_rollout) for i, tokens in enumerate(ids)]


def answers(engine, prompts, completions=3, **sampling):
    groups = list(engine.generate(prompts, completions, Sampling(**{"max_new_tokens": 40, "seed": 11, **sampling})))
    return sorted(groups, key=lambda group: group.prompt.index)


@torch.no_grad()
def teacher_forced(policy, groups, temperature):
    """What the learner computes of the completions' tokens."""
    batch = TrainingBatch(
        [group.prompt.token_ids for group in groups for _ in group.completions],
        [c.token_ids for group in groups for c in group.completions],
        [c.logprobs for group in groups for c in group.completions],
        [0.0] * sum(len(group.completions) for group in groups),
        len(groups[0].completions),
    )
    packed = pack(batch, list(range(len(batch))), "cpu")
    hidden = policy.hidden_states(packed.ids, packed.cu_seqlens)[packed.predict]
    found, _ = token_logprobs(hidden, packed.targets, policy.lm_head, temperature=temperature)
    return found, torch.tensor([value for row in batch.logprobs for value in row])


@pytest.fixture(scope="module", params=[("nsa", False), ("nsa", True), ("full", True)], ids=["nsa", "nsa-tied", "full"])
def served(request, tmp_path_factory):
    policy = random_policy(*request.param, seed=0)
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    return policy, folder, new_engine(folder)


def test_logprobs_are_the_learners(served):
    policy, _, engine = served
    for temperature in (1.0, 0.7):
        groups = answers(engine, prompts_of(60, 3, 33, 20), temperature=temperature)
        learners, engines = teacher_forced(policy, groups, temperature)
        torch.testing.assert_close(engines, learners, atol=2e-5, rtol=2e-5)


def test_a_completion_ends_with_the_codecs_token_or_is_truncated(served):
    _, _, engine = served
    completions = [c for group in answers(engine, prompts_of(9, 30, 14), completions=8) for c in group.completions]
    for completion in completions:
        assert END not in completion.token_ids[:-1]
        assert completion.truncated == (completion.token_ids[-1] != END)
        assert len(completion.token_ids) == 40 or not completion.truncated
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.text == Words().decode(completion.token_ids)
    assert len({c.truncated for c in completions}) == 2
    # The folder's own end token is one like any other.
    assert any(7 in c.token_ids[:-1] for c in completions)


def test_a_seed_names_its_draws(served):
    _, _, engine = served
    prompts = prompts_of(9, 30, 14)
    whole = [[c.token_ids for c in group.completions] for group in answers(engine, prompts)]
    alone = [[c.token_ids for c in answers(engine, [prompt])[0].completions] for prompt in reversed(prompts)]
    assert whole == alone[::-1]
    assert len({tuple(ids) for group in whole for ids in group}) == 9
    assert [[c.token_ids for c in g.completions] for g in answers(engine, prompts, seed=12)] != whole
    later = answers(engine, prompts_of(9, 30, 14, first_rollout=3))
    assert not {tuple(c.token_ids) for g in later for c in g.completions} & {tuple(i) for g in whole for i in g}


def test_greedy_completions_are_the_native_engines(served):
    _, folder, engine = served
    native = NativeEngine(str(folder), attention=None, codec=Words(), slots=8, device="cpu")
    prompts = prompts_of(60, 3, 33)
    for ours, theirs in zip(
        answers(native, prompts, 2, temperature=0), answers(engine, prompts, 2, temperature=0), strict=True
    ):
        assert [c.token_ids for c in ours.completions] == [c.token_ids for c in theirs.completions]
        for a, b in zip(ours.completions, theirs.completions, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=2e-5, rtol=2e-5)


def test_new_weights_arrive_whole(served):
    """In one call; every tensor; and no cached prefix of the old ones is used after it."""
    policy, _, engine = served
    other = random_policy(policy.config.attention, policy.config.tie_word_embeddings, seed=1)
    prompts = prompts_of(60, 50)
    before = answers(engine, prompts, temperature=0)
    for version, weights in ((1, other), (2, policy)):
        engine.load_weights(version, {name: p.detach().clone() for name, p in weights.named_parameters()})
        assert engine.checksum() == pytest.approx(absolute_sum(weights.parameters()), rel=1e-12)
        groups = answers(engine, prompts)
        assert {group.policy_version for group in groups} == {version}
        learners, engines = teacher_forced(weights, groups, 1.0)
        torch.testing.assert_close(engines, learners, atol=2e-5, rtol=2e-5)
    after = answers(engine, prompts, temperature=0)
    assert [g.completions for g in after] == [g.completions for g in before]
    engine.version = 0


def test_weights_of_another_policy_are_refused(served):
    policy, _, engine = served
    tensors = {name: p.detach() for name, p in policy.named_parameters()}
    name = "model.layers.1.mlp.up_proj.weight"
    prompts = prompts_of(9, 30)
    before = answers(engine, prompts)
    for wrong in ({**tensors, "surplus": tensors[name]}, {n: t for n, t in tensors.items() if n != name}):
        with pytest.raises(ValueError, match="weights of another policy"):
            engine.load_weights(1, wrong)
    with pytest.raises(ValueError, match=f"weights of another shape: {name}"):
        engine.load_weights(1, {**tensors, name: tensors[name][:-1]})
    assert [g.completions for g in answers(engine, prompts)] == [g.completions for g in before]


def test_an_abandoned_rollout_leaves_nothing_behind(served):
    _, _, engine = served
    prompts = prompts_of(9, 30, 14)
    whole = answers(engine, prompts)
    abandoned = engine.generate(prompts, 3, Sampling(40, seed=11))
    next(abandoned)
    abandoned.close()
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert [g.completions for g in answers(engine, prompts)] == [g.completions for g in whole]
