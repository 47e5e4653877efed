"""Blocks chosen in rollout come back with completions, and the learner attends to exactly those."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from plumbline.errors import InputError
from plumbline.models.attention import open_gate_bias
from plumbline.models.config import PolicyConfig
from plumbline.models.load import load_policy, load_tokenizer, policy_config
from plumbline.models.policy import Policy
from plumbline.rl.batch import Completion, Group, Prompt, Sampling
from plumbline.rl.blocks import BlockCodec
from plumbline.rl.coldstart import save
from plumbline.rl.collect import _completion, _plain
from plumbline.rl.config import parse_config
from plumbline.rl.launch import launch_training
from plumbline.rl.learner import Learner
from plumbline.rl.records import training_batch
from plumbline.rl.rollout.native import NativeEngine

NSA = {"block": 4, "stride": 2, "select_block": 4, "count": 5, "window": 4}
FIRST = 20  # count x select_block


class Words:
    end_ids = frozenset([5])

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def config(**changes) -> PolicyConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention": "nsa",
        "nsa": NSA,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return PolicyConfig(**{**settings, **changes})


@pytest.fixture
def policy() -> Policy:
    """Open gates on the selected branch alone: what the compressed keys say is seen in the choice and nowhere else."""
    torch.manual_seed(0)
    policy = Policy(config()).float().eval()
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.gate_proj.weight.zero_()
            layer.self_attn.gate_proj.bias.copy_(open_gate_bias(4))
    return policy


def disturbed(policy: Policy, size: float) -> Policy:
    """Other compressed keys: other choices, and the same function of the chosen blocks."""
    other = Policy(policy.config).float().eval()
    other.load_state_dict(policy.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.phi_k_weight.add_(torch.randn_like(layer.self_attn.phi_k_weight) * size)
    return other


def prompts(*lengths):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(6, 61, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(i, str(i), tokens, "", "", key=1) for i, tokens in enumerate(ids)]


def roll_out(folder, *lengths, completions=3, **sampling):
    engine = NativeEngine(str(folder), attention=None, codec=Words(), slots=6, device="cpu")
    settings = {"max_new_tokens": 30, "seed": 4, "record_blocks": True, **sampling}
    groups = sorted(
        engine.generate(prompts(*lengths), completions, Sampling(**settings)), key=lambda group: group.prompt.index
    )
    for group in groups:
        group.rewards = [float(number) for number in range(completions)]
    return groups


def learner_of(folder, **changes):
    tree = {
        "name": "blocks",
        "policy": {"path": str(folder), "device": "cpu"},
        "rollout": {"max_new_tokens": 30, "replay_blocks": True, **changes.pop("rollout", {})},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 130, **changes.pop("learner", {})},
        # The learner works the log-probabilities out anew, so that they can be compared with rollout's.
        "algorithm": {"correction": {"method": "truncate"}, **changes.pop("algorithm", {})},
    }
    return Learner(parse_config(tree), "cpu")


@pytest.fixture
def folders(policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    disturbed(policy, 1.0).save_pretrained(tmp_path / "other")
    return tmp_path / "policy", tmp_path / "other"


@torch.no_grad()
def test_packing_gives_back_every_position(policy):
    ids = torch.randint(0, 61, (97,))
    record, ends = policy.new_record(97), torch.tensor([0, 60, 60, 97], dtype=torch.int32)
    policy.prefill(policy.new_cache(2, 64), torch.tensor([0, 1]), ids, ends[[0, 1, 3]], record=record)
    codec = BlockCodec(policy.config)
    assert codec.first == FIRST
    for first, last in ((0, 60), (60, 97)):
        whole = record[first:last]
        data = codec.pack(whole[FIRST:])
        # layers x kv heads x (5 - 1 - 2 forced) bytes a token beyond the first 20
        assert len(data) == 1 + (last - first - FIRST) * 3 * 2 * 2
        assert torch.equal(codec.unpack(data, last - first), whole)
    for tokens in (0, 1, FIRST):
        assert codec.pack(record[:tokens][FIRST:]) == b""
        assert torch.equal(codec.unpack(b"", tokens), record[:tokens])


@pytest.mark.parametrize(("block", "width"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4)])
def test_numbers_are_as_wide_as_they_must_be(block, width):
    codec = BlockCodec(config())
    chosen = codec.unpack(b"", FIRST)[-1:].clone()
    chosen[..., 1:3] = torch.tensor([7, block])
    data = codec.pack(chosen.expand(2, -1, -1, -1))
    assert len(data) == 1 + 2 * 3 * 2 * 2 * width
    assert torch.equal(codec.unpack(data, FIRST + 2)[FIRST:, ..., 1:3], chosen[..., 1:3].expand(2, -1, -1, -1))


def test_bytes_that_do_not_fit_are_refused(policy):
    codec = BlockCodec(policy.config)
    blocks = torch.zeros(4, 3, 2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="not those of 5 tokens"):
        codec.unpack(codec.pack(blocks), FIRST + 5)
    with pytest.raises(ValueError, match="0 bytes of blocks are not those of 1 tokens"):
        codec.unpack(b"", FIRST + 1)
    with pytest.raises(ValueError, match="has fewer"):
        codec.pack(blocks - 1)


@torch.no_grad()
def test_what_was_recorded_is_replayed(policy):
    """Packed sequences of unlike lengths, padded in several groups; a policy that would choose otherwise."""
    lengths = [1, 70, 30, 3, 64]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.randint(0, 61, (int(ends[-1]),))
    record = policy.new_record(len(ids))
    hidden = policy.model.run(ids, ends, record=record)
    assert torch.equal(hidden, policy.hidden_states(ids, ends))
    assert torch.equal(policy.hidden_states(ids, ends, record), hidden)
    other = disturbed(policy, 1.0)
    assert (other.hidden_states(ids, ends) - hidden).abs().max() > 1e-2
    torch.testing.assert_close(other.hidden_states(ids, ends, record), hidden, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_records_what_reading_does(policy):
    ids = torch.randint(0, 61, (50,))
    whole, ends = policy.new_record(50), torch.tensor([0, 50], dtype=torch.int32)
    policy.model.run(ids, ends, record=whole)
    cache, slot = policy.new_cache(1, 50), torch.tensor([0])
    policy.prefill(cache, slot, ids[:8], torch.tensor([0, 8], dtype=torch.int32))
    for position in range(8, 50):
        record = policy.new_record(1)
        policy.decode(cache, slot, ids[position : position + 1], record=record)
        assert torch.equal(record[0], whole[position])


def test_the_learner_scores_what_rollout_attended_to(folders):
    """Weights that would choose otherwise: equal with replay, far off without."""
    rolled, learning = folders
    groups = roll_out(rolled, 45, 3, 18)
    batch = training_batch(groups, replay_blocks=True)
    with_replay = learner_of(learning).prepare(batch)
    rollout = torch.zeros_like(with_replay.old_logprobs)
    for row, values in enumerate(batch.logprobs):
        rollout[row, : len(values)] = torch.tensor(values)
    torch.testing.assert_close(with_replay.old_logprobs, rollout, atol=2e-5, rtol=2e-5)
    without = learner_of(learning, rollout={"replay_blocks": False}).prepare(training_batch(groups))
    assert (without.old_logprobs - rollout).abs().max() > 1e-2


def test_scores_that_tie(policy, tmp_path):
    """All compressed keys equal in rollout, so that every choice is a tie; rounding breaks it elsewhere in training."""
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.phi_k_weight.zero_()
    policy.save_pretrained(tmp_path / "ties")
    disturbed(policy, 1e-6).save_pretrained(tmp_path / "rounding")
    groups = roll_out(tmp_path / "ties", 45, 18)
    batch = training_batch(groups, replay_blocks=True)
    found = learner_of(tmp_path / "rounding").prepare(batch).old_logprobs
    for row, values in enumerate(batch.logprobs):
        torch.testing.assert_close(found[row, : len(values)], torch.tensor(values), atol=2e-5, rtol=2e-5)
    without = learner_of(tmp_path / "rounding", rollout={"replay_blocks": False}).prepare(training_batch(groups))
    assert (without.old_logprobs - found).abs().max() > 1e-3


def test_training_replays_with_and_without_checkpointed_activations(folders):
    rolled, learning = folders
    batch = training_batch(roll_out(rolled, 45, 18), replay_blocks=True)
    learners = [learner_of(learning, learner={"gradient_checkpointing": on}) for on in (False, True)]
    first, second = (learner.update(batch) for learner in learners)
    assert first["learner/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first == pytest.approx(second, abs=1e-6)
    assert first["learner/gradient_norm"] > 0
    unlike = learner_of(learning, rollout={"replay_blocks": False}).update(dataclasses.replace(batch, blocks=None))
    assert unlike["learner/gradient_norm"] != pytest.approx(first["learner/gradient_norm"], rel=1e-3)


def test_the_reference_chooses_for_itself(folders):
    rolled, learning = folders
    batch = training_batch(roll_out(rolled, 45), replay_blocks=True)
    settings = {"algorithm": {"kl_coefficient": 0.1}}
    found = learner_of(learning, **settings).prepare(batch).reference_logprobs
    alone = learner_of(learning, rollout={"replay_blocks": False}, **settings).prepare(batch).reference_logprobs
    assert torch.equal(found, alone)


def test_recording_changes_no_token_and_is_off_by_default(folders):
    rolled, _ = folders
    with_blocks, without = roll_out(rolled, 45, 3), roll_out(rolled, 45, 3, record_blocks=False)
    for a, b in zip(with_blocks, without, strict=True):
        assert [dataclasses.replace(c, blocks=b"") for c in a.completions] == b.completions
    assert any(c.blocks for group in with_blocks for c in group.completions)


def test_full_attention_has_no_blocks(tmp_path):
    torch.manual_seed(0)
    Policy(config(attention="full", nsa=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="full attention chooses no blocks"):
        roll_out(tmp_path, 4)
    with pytest.raises(ValueError, match="full attention chooses no blocks"):
        learner_of(tmp_path)
    policy = load_policy(tmp_path)
    with pytest.raises(ValueError, match="full attention chooses no blocks"):
        policy.hidden_states(torch.tensor([1]), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 3, 2, 5))


def test_a_run_with_full_attention_is_refused_before_it_starts(policy_path, tmp_path):
    dense = PolicyConfig(**{**policy_config(policy_path).to_dict(), "attention": "full", "nsa": None})
    save(Policy(dense), load_tokenizer(policy_path), tmp_path / "dense")
    tree = {"name": "x", "output": str(tmp_path / "x"), "policy": {"path": str(tmp_path / "dense")}}
    with pytest.raises(InputError, match=r"replay_blocks .* has full attention"):
        launch_training(parse_config({**tree, "rollout": {"replay_blocks": True}}), Console(quiet=True))
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"needs rollout.engine native"):
        parse_config({**tree, "rollout": {"replay_blocks": True, "engine": "vllm"}})


def test_a_group_that_waits_for_its_rest_keeps_its_blocks_through_a_checkpoint():
    group = Group(Prompt(0, "a", [1], "", ""), [Completion([5], [-1.0], "", False, b"\x01\xff\x00")], 2)
    state = json.loads(json.dumps(_plain(group)))
    assert [_completion(entry) for entry in state["completions"]] == group.completions
