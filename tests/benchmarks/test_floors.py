"""The floors against counts made token by token."""

import pytest

from benchmarks.floors import Rates, Shape, Work, decode_step, rollout, update
from plumbline.models.config import PolicyConfig
from plumbline.models.policy import Policy

CONFIG = PolicyConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_policy(tied):
    config = PolicyConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": tied})
    shape = Shape.of(config)
    policy = Policy(config)
    matrices = [p for p in policy.parameters() if p.ndim == 2]
    assert shape.parameters == sum(p.numel() for p in matrices)
    assert shape.body == sum(p.numel() for name, p in policy.named_parameters() if "layers" in name and p.ndim == 2)
    assert shape.head == policy.lm_head.weight.numel()
    cache = policy.new_cache(1, 1)
    # float32 there, bfloat16 in the count
    assert shape.token_bytes == sum(t.numel() * 2 for layer in cache.layers for t in layer.tensors())


def test_a_rollout_is_its_prompts_and_its_steps():
    shape = Shape.of(CONFIG)
    prompts, completions = [5, 9], [[4, 7], [3, 7]]
    whole = rollout(shape, prompts, completions)
    flops = sum(2 * shape.body * p + 2 * shape.head * len(c) for p, c in zip(prompts, completions, strict=True))
    flops += shape.pair_flops(sum(i + 1 for p in prompts for i in range(p)))
    moved = 2 * (shape.body + shape.head) + sum(prompts) * shape.token_bytes
    for step in range(1, 7):
        under_way = [
            p + step - 1 for p, group in zip(prompts, completions, strict=True) for n in group if step <= n - 1
        ]
        one = decode_step(shape, under_way)
        flops += one.flops
        moved += one.bytes
    assert whole.flops == pytest.approx(flops)
    assert whole.bytes == pytest.approx(moved)


def test_an_update_counts_three_passes():
    shape = Shape.of(CONFIG)
    work = update(shape, [(5, 4)])
    pairs = sum(range(1, 9))
    assert work.flops == 6 * shape.body * 8 + 6 * shape.head * 4 + 3.5 * shape.pair_flops(pairs)
    assert work.bytes == 28 * shape.parameters


def test_the_longer_of_the_two_is_the_floor():
    rates = Rates(flops=100.0, copied=10.0)
    assert Work(bytes=50, flops=100).seconds(rates) == 5
    assert Work(bytes=5, flops=100).seconds(rates) == 1
    assert Work(bytes=5, flops=100).shown(rates, 4.0)["share"] == 0.25
