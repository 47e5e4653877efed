"""Decoding from the cache equals the packed forward, token by token, with the same blocks."""

import pytest
import torch

from plumbline.kernels.nsa import (
    DecodePlan,
    Layout,
    NSACache,
    NSAConfig,
    PhiParams,
    decode_step,
    native_sparse_attention,
)
from plumbline.kernels.nsa.cache import ring_places, slot_rows

CONFIGS = {
    "linear": NSAConfig(block=8, stride=4, select_block=8, count=4, window=12),
    "mlp": NSAConfig(block=12, stride=4, select_block=16, count=3, initial=1, local=1, window=5, phi="mlp"),
    "mean": NSAConfig(block=4, stride=4, select_block=4, count=5, initial=2, local=2, window=40, phi="mean"),
    "odd": NSAConfig(block=9, stride=3, select_block=6, count=6, initial=0, local=1, window=7),
    "wide": NSAConfig(block=8, stride=4, select_block=8, count=6, window=150),
}
PAGE = 12


def take(pair, rows):
    return pair[0][rows], pair[1][rows]


def check_decode(
    definition, config, lengths, prompts, backend, *, new, paged, shape=(4, 2, 16, 12), dtype=torch.float32, room=0
):
    """Feeds the sequences through a cache with room for more, after prefilling the prompts, `new` tokens at a time."""
    heads, kv_heads, dk, dv = shape
    x = definition.make_inputs(lengths, heads, kv_heads, dk, dv, config, seed=1, dtype=dtype)
    params = PhiParams(*x.params)
    expected, blocks = native_sparse_attention(
        x.q, *x.kv, x.gates, x.cu_seqlens, params, config, return_blocks=True, backend="torch"
    )
    options = {"dtype": dtype, "device": "cpu"}
    if paged:
        # Pages of the sequences interleaved, the first page of the cache unused; what no sequence owns stays NaN.
        each = -(-max(lengths) // PAGE)
        table = 1 + torch.arange(each)[None] * len(lengths) + torch.arange(len(lengths))[:, None]
        cache = NSACache(1 + table.numel(), max(lengths), kv_heads, dk, dv, config, page=PAGE, **options)
        for tensor in cache.tensors():
            tensor[0] = torch.nan
        slots = table.masked_fill(torch.arange(each) * PAGE >= torch.tensor(lengths)[:, None], 0)
    else:
        # The sequences sit in slots of a larger cache, out of order.
        slots = torch.tensor([4, 0, 2])
        cache = NSACache(5, max(lengths) + room, kv_heads, dk, dv, config, new=new, **options)
        for tensor in cache.tensors():
            tensor.fill_(1e3)  # what sequences before left there
        for pair in (cache.raw["cmp"], cache.raw["win"]):
            for tensor in pair:
                tensor.fill_(torch.nan)
    starts, first = x.cu_seqlens[:-1].long(), torch.tensor(prompts)
    if sum(prompts):
        rows = torch.cat([starts[b] + torch.arange(n) for b, n in enumerate(prompts)])
        layout = Layout(torch.tensor([0, *prompts]).cumsum(0).int())
        cache.prefill(slots, *(take(pair, rows) for pair in x.kv), layout, params)
    for step in range(0, max(n - p for n, p in zip(lengths, prompts, strict=True)), new):
        position = first + step
        live = position + new <= torch.tensor(lengths)
        if not live.any():
            break
        rows = ((starts + position)[live, None] + torch.arange(new)).flatten()
        plan = DecodePlan(slots[live], position[live], config, cache.max_length, new=new, page=cache.page)
        out, chosen = decode_step(
            x.q[rows], *(take(pair, rows) for pair in x.kv), x.gates[rows], cache, plan, params,
            backend=backend, return_blocks=True,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen, blocks[rows])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prompts", [[0, 0, 0], [0, 23, 7]], ids=["empty", "prefilled"])
@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@torch.no_grad()
def test_decode_equals_forward(definition, name, prompts, paged):
    check_decode(definition, CONFIGS[name], [61, 50, 37], prompts, "torch", new=1, paged=paged)


@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
@torch.no_grad()
def test_several_new_tokens_at_once(definition, paged):
    check_decode(definition, CONFIGS["linear"], [61, 50, 37], [0, 20, 5], "torch", new=5, paged=paged)


@pytest.mark.parametrize(
    ("name", "prompts", "new", "paged"),
    [
        ("linear", [30, 0, 17], 3, False),
        ("mlp", [24, 11, 0], 6, True),
        ("mean", [29, 23, 7], 4, False),
        ("odd", [41, 30, 0], 5, True),
        ("wide", [41, 30, 0], 5, False),
    ],
)
@torch.no_grad()
def test_triton_decode_equals_forward(definition, name, prompts, new, paged):
    check_decode(definition, CONFIGS[name], [47, 40, 19], prompts, "triton", new=new, paged=paged, shape=(6, 2, 16, 24))


# Configurations and their rings: places for just the block and the window; for nearly twice as many; for one token.
RINGS = {
    "exact": (NSAConfig(block=8, stride=4, select_block=8, count=4, window=16), 8, 16),
    "over": (NSAConfig(block=9, stride=3, select_block=9, count=4, window=17, phi="mean"), 16, 32),
    "one": (NSAConfig(block=16, stride=16, select_block=16, count=3, local=1, window=1), 16, 1),
    "default": (NSAConfig(select_block=32, count=4, window=20, phi="mlp"), 32, 32),
}


@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("prompts", ["short", "even", "over", "long"])
@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_rings_hold_what_decoding_reads(definition, name, prompts, new):
    """Far beyond the rings' places, from prompts on either side of them, all read in one padded batch."""
    config, block, window = RINGS[name]
    assert ring_places(config, 1) == {"cmp": block, "win": window}
    chosen = {
        "short": [1, block - 1, 2],
        "even": [window, block, 2 * block],
        "over": [window + 1, block + 1, 2 * block + 1],
        "long": [5 * block + 1, 7, 3 * block - 1],
    }[prompts]
    more = 2 * max(block, window) + 5
    lengths = [chosen[0] + more, chosen[1] + more // 2, chosen[2] + 7]
    check_decode(
        definition, config, lengths, chosen, "torch", new=new, paged=False, dtype=torch.float64, room=70
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lengths", "prompts", "new"),
    [
        ("exact", [41, 21, 20], [35, 14, 17], 1),
        ("exact", [38, 9, 6], [1, 3, 2], 1),
        ("over", [60, 41, 21], [50, 31, 9], 4),
        ("one", [52, 17, 4], [46, 15, 1], 1),
        ("default", [83, 49, 22], [77, 47, 20], 2),
    ],
)
@torch.no_grad()
def test_triton_rings_hold_what_decoding_reads(definition, name, lengths, prompts, new):
    config = RINGS[name][0]
    shape = (2, 2, 16, 24)
    check_decode(definition, config, lengths, prompts, "triton", new=new, paged=False, shape=shape, room=30)


@pytest.mark.parametrize("name", ["linear", "mlp"])
@torch.no_grad()
def test_triton_programs_may_run_in_any_order(definition, monkeypatch, name):
    """From the last to the first: none writes to a ring what another one of the same launch still reads there."""
    from triton.runtime.interpreter import interpreter_builder

    set_index = interpreter_builder.set_grid_idx

    def backwards(*index):
        set_index(*(size - 1 - i for size, i in zip(interpreter_builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)
    lengths, prompts = [44, 34, 17], [32, 22, 5]
    check_decode(definition, CONFIGS[name], lengths, prompts, "triton", new=6, paged=False, shape=(2, 2, 16, 24))


def test_rings_are_the_smallest_that_suffice():
    for new in (1, 2, 7):
        for tokens in range(1, 70):
            config = NSAConfig(block=tokens, stride=1, select_block=8, window=tokens)
            for places in ring_places(config, new).values():
                # A step's first token reads `tokens` back, while its last one is in place.
                assert places >= tokens + new - 1 > places // 2
                assert places & (places - 1) == 0
    config = NSAConfig(window=500)
    assert slot_rows(config, 16384) == {"cmp": 32, "slc": 16384, "win": 512, "blocks": 1023}
    assert slot_rows(config, 16384, new=14) == {"cmp": 64, "slc": 16384, "win": 1024, "blocks": 1023}
    assert slot_rows(config, 20) == {"cmp": 20, "slc": 20, "win": 20, "blocks": 0}
    cache = NSACache(3, 600, 2, 4, 5, config, dtype=torch.float32, device="cpu")
    assert [list(tensor.shape) for tensor in cache.tensors()] == [
        [3, 2, rows, dim] for rows in (32, 600, 512, 36) for dim in (4, 5)
    ]


@pytest.mark.parametrize("name", ["linear", "wide"])
@torch.no_grad()
def test_triton_decode_in_many_parts(definition, monkeypatch, name):
    """Tiles so small that compressed keys, window and chosen blocks are all cut into parts."""
    from plumbline.kernels.nsa.triton_backend import decode

    for size in ("KEYS", "WIDE_KEYS"):
        monkeypatch.setattr(decode, size, 16)
    monkeypatch.setattr(decode, "SUMMED_AT_ONCE", 8)
    monkeypatch.setattr(decode, "MERGED_COLUMNS", 8)
    check_decode(definition, CONFIGS[name], [150, 64, 33], [146, 60, 29], "triton", new=4, paged=True)


def test_blocks_chosen_in_decoding_replay_in_training(definition):
    """What a rollout attended to, given back as block_indices, is what training attends to."""
    config, n = CONFIGS["linear"], 45
    x = definition.make_inputs([n], 4, 2, 16, 16, config, seed=3)
    params = PhiParams(*x.params)
    cache = NSACache(1, n, 2, 16, 16, config, dtype=torch.float32, device="cpu")
    outs, chosen = [], []
    with torch.no_grad():
        for t in range(n):
            plan = DecodePlan(torch.tensor([0]), torch.tensor([t]), config, n)
            # Rollout may see other keys than training (an older policy): here the compressed ones are negated.
            cmp = tuple(-a for a in take(x.kv[0], [t]))
            out, blocks = decode_step(
                x.q[[t]], cmp, take(x.kv[1], [t]), take(x.kv[2], [t]), x.gates[[t]] * torch.tensor([0.0, 1, 1]),
                cache, plan, params, return_blocks=True,
            )  # fmt: skip
            outs.append(out)
            chosen.append(blocks)
    gates = x.gates * torch.tensor([0.0, 1, 1])
    free, own = native_sparse_attention(x.q, *x.kv, gates, x.cu_seqlens, params, config, return_blocks=True)
    replayed, used = native_sparse_attention(
        x.q, *x.kv, gates, x.cu_seqlens, params, config, block_indices=torch.cat(chosen), return_blocks=True
    )
    assert torch.equal(used, torch.cat(chosen))
    assert not torch.equal(own, used)
    torch.testing.assert_close(replayed, torch.cat(outs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(replayed, free, atol=1e-3)


def test_a_full_slot_is_refused():
    config = CONFIGS["linear"]
    slots = torch.tensor([0])
    with pytest.raises(ValueError, match="does not fit a cache of 8"):
        DecodePlan(slots, torch.tensor([8]), config, 8)
    with pytest.raises(ValueError, match="9 tokens does not fit a cache of 8"):
        DecodePlan(slots, torch.tensor([6]), config, 8, new=3)
    with pytest.raises(ValueError, match="does not fit 1 pages of 4"):
        DecodePlan(slots[:, None], torch.tensor([4]), config, 8, page=4)
    with pytest.raises(ValueError, match="page table"):
        DecodePlan(slots, torch.tensor([4]), config, 8, page=4)
    with pytest.raises(ValueError, match="new must be"):
        DecodePlan(slots, torch.tensor([4]), config, 8, new=0)
    with pytest.raises(ValueError, match="new must be"):
        NSACache(1, 8, 1, 4, 4, config, new=0, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="page must be"):
        NSACache(1, 8, 1, 4, 4, config, page=6, dtype=torch.float32, device="cpu")
    cache = NSACache(1, 8, 1, 4, 4, config, dtype=torch.float32, device="cpu")
    pair = torch.zeros(9, 1, 4), torch.zeros(9, 1, 4)
    zeros = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4)
    layout = Layout(torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="9 tokens does not fit"):
        cache.prefill(torch.tensor([0]), pair, pair, pair, layout, PhiParams(*zeros, *zeros))
    one = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    q, gates, params = torch.zeros(2, 1, 4), torch.zeros(2, 1, 3), PhiParams(*zeros, *zeros)
    plan = DecodePlan(slots, torch.tensor([0]), config, 8)
    with pytest.raises(ValueError, match="q has 2 rows"):
        decode_step(q, one, one, one, gates, cache, plan, params)
    two = DecodePlan(slots, torch.tensor([0]), config, 8, new=2)
    with pytest.raises(ValueError, match="appends 2 tokens a sequence, the cache is made for new = 1"):
        decode_step(q, *[(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))] * 3, gates, cache, two, params)
    longer = DecodePlan(slots, torch.tensor([8]), config, 9)
    with pytest.raises(ValueError, match="sequences of 9 tokens, the cache holds 8"):
        decode_step(q[:1], one, one, one, gates[:1], cache, longer, params)
    paged = DecodePlan(slots[:, None], torch.tensor([0]), config, 8, page=8)
    with pytest.raises(ValueError, match="pages of 8"):
        decode_step(q[:1], one, one, one, gates[:1], cache, paged, params)
