"""Attention from pages equals attention on whole sequences, whatever the chunks, the pages and the company."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plumbline.kernels.nsa import NSAConfig, PhiParams, native_sparse_attention
from plumbline.models.vllm import decode, paged
from plumbline.models.vllm.decode import divide

HEADS, KV_HEADS, DIM = 6, 2, 8


def params(config: NSAConfig) -> PhiParams:
    block = config.block
    shape = {"linear": (block, DIM, DIM), "mean": (block,), "mlp": (block + 1, DIM, DIM)}[config.phi]
    parts = [torch.randn(KV_HEADS, *size) / 4 for size in (shape, (block, DIM), shape, (block, DIM))]
    return PhiParams(*parts)


def make_pages(sequences: int, length: int, size: int, per_entry: int = 1) -> paged.Pages:
    """Pages in random order, full of garbage."""
    entries = -(-length // per_entry)
    columns = -(-entries // size)
    table = (torch.randperm(sequences * columns) + 1).view(sequences, columns)
    return paged.Pages(torch.full((sequences * columns + 1, KV_HEADS, size, 2 * DIM), torch.nan), table, DIM)


@pytest.mark.parametrize(
    "config",
    [
        NSAConfig(block=8, stride=4, select_block=8, count=4, window=16),
        NSAConfig(block=4, stride=4, select_block=8, count=5, local=1, window=5, phi="mlp"),
        NSAConfig(block=12, stride=4, select_block=16, count=3, window=100, phi="mean", scale=0.2),
    ],
    ids=["linear", "mlp", "mean"],
)
@pytest.mark.parametrize(
    ("chunks", "kernels"),
    [
        ([[90], [3], [61]], False),
        ([[1] * 90, [1] * 3, [1] * 61], False),
        ([[40, 1, 1, 30, 18], [2, 1], [0, 0, 60, 1]], False),
        # Triton's interpreter is slow: few steps, with sequences that decode alone and beside others.
        # The second chunk of the last crosses compression blocks, and is cut itself.
        ([[86, 1, 1, 1, 1], [3], [30, 28, 1, 0, 2]], True),
    ],
    ids=["whole", "one by one", "mixed", "kernels"],
)
def test_pages_equal_whole_sequences(config, chunks, kernels, monkeypatch):
    if kernels and torch.cuda.is_available():
        pytest.skip("tests/conftest.py leaves Triton's interpreter off where there is a GPU")
    monkeypatch.setattr(paged, "SCORES_AT_ONCE", 6 * 90 * 20)  # chunks of queries, too
    monkeypatch.setattr(decode, "CHUNK_ROWS", 11)
    torch.manual_seed(0)
    lengths = [sum(parts) for parts in chunks]
    total = sum(lengths)
    q, gates = torch.randn(total, HEADS, DIM), torch.rand(total, HEADS, 3)
    pairs = [(torch.randn(total, KV_HEADS, DIM), torch.randn(total, KV_HEADS, DIM)) for _ in range(3)]
    phi = params(config)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    whole = native_sparse_attention(q, *pairs, gates, ends, phi, config)

    sizes = {"cmp": (8, 1), "slc": (8 if kernels else 24, 1), "win": (8, 1), "blocks": (6, config.stride)}
    pages = {kind: make_pages(3, 90, *size) for kind, size in sizes.items()}
    stores, tables = ({kind: getattr(p, name) for kind, p in pages.items()} for name in ("store", "table"))
    done = [0, 0, 0]
    for number in range(max(map(len, chunks))):
        news = [parts[number] if number < len(parts) else 0 for parts in chunks]
        rows = torch.cat([ends[i] + done[i] + torch.arange(new) for i, new in enumerate(news)]).long()
        done = [have + new for have, new in zip(done, news, strict=True)]
        starts = [0, *torch.tensor(news).cumsum(0).tolist()]
        kv = [(k[rows], v[rows]) for k, v in pairs]
        out = torch.full_like(whole[rows], torch.nan)
        for part in divide(starts, torch.tensor(done), max(done), tables, config, 8, kernels):
            out[part.rows] = part.attend(q[rows], *kv, gates[rows], stores, phi)
        torch.testing.assert_close(out, whole[rows], atol=1e-5, rtol=1e-4)
    assert done == lengths


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for the device, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero")):
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/conftest.py leaves Triton's interpreter off there")
def test_decode_steps_read_nothing_on_the_host_and_padding_disturbs_nobody():
    config = NSAConfig(block=8, stride=4, select_block=8, count=4, window=16)
    torch.manual_seed(0)
    phi = params(config)
    pages = {kind: make_pages(2, 90, 8, per) for kind, per in {"cmp": 1, "slc": 1, "win": 1, "blocks": 4}.items()}
    stores, tables = ({kind: getattr(p, name) for kind, p in pages.items()} for name in ("store", "table"))
    for store in stores.values():
        store.normal_()
    q, gates = torch.randn(3, HEADS, DIM), torch.rand(3, HEADS, 3)
    kv = [(torch.randn(3, KV_HEADS, DIM), torch.randn(3, KV_HEADS, DIM)) for _ in range(3)]

    def step(lengths: list[int], longest: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # A row beyond the batch has no tokens, and a block table of nothing but page 0, which nobody owns.
        rows, own = len(lengths), {kind: store.clone() for kind, store in stores.items()}
        padded = {kind: torch.cat([t, torch.zeros_like(t[:1])])[:rows] for kind, t in tables.items()}
        after = torch.tensor(lengths, dtype=torch.int32)
        with NoReads():
            [part] = divide(list(range(rows + 1)), after, longest, padded, config, 8, kernels=True)
            out = part.attend(q[:rows], *((k[:rows], v[:rows]) for k, v in kv), gates[:rows], own, phi)
        return out[:2], own

    out, after = step([72, 3], 72)
    padded_out, padded_after = step([72, 3, 0], 88)  # as in a graph captured for the longest sequence there may be
    torch.testing.assert_close(padded_out, out, atol=1e-6, rtol=1e-5)
    for kind, store in after.items():
        assert torch.equal(padded_after[kind][1:], store[1:])
        assert not torch.equal(store, stores[kind])  # token 71 completes a block, too


def test_a_page_of_compressed_keys_depends_on_no_later_token():
    config = NSAConfig(block=8, stride=4, select_block=8, count=4, window=16)
    torch.manual_seed(0)
    phi, stores = params(config), []
    prefix = [torch.randn(32, KV_HEADS, DIM) for _ in range(2)]
    for _ in range(2):
        rest = [torch.randn(20, KV_HEADS, DIM) for _ in range(2)]
        k, v = (torch.cat(pair) for pair in zip(prefix, rest, strict=True))
        pages = paged.Branches(*(make_pages(1, 52, size, per) for size, per in ((8, 1), (8, 1), (8, 1), (4, 4))))
        q, gates = torch.randn(52, HEADS, DIM), torch.rand(52, HEADS, 3)
        step = paged.Step([0, 52], [52], config, q.device)
        paged.paged_attention(q, (k, v), (k, v), (k, v), gates, pages, step, phi)
        stores.append(pages.blocks.store[pages.blocks.table[0]])
    # Two pages of four entries cover the 32 tokens both have; the first entry of all is never used.
    assert torch.equal(stores[0][:2].nan_to_num(), stores[1][:2].nan_to_num())
    assert not torch.equal(stores[0][2], stores[1][2])
    assert stores[0][:2].isnan().any(-1).sum() == KV_HEADS
