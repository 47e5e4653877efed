"""Times one decoding step of Native Sparse Attention, in a CUDA graph, against dense attention over the same context.

    PYTHONPATH=. python benchmarks/nsa_decode.py [--shapes A] [--tokens 8192 65536] [--batch 8] [--json PATH]

bfloat16, block 32, stride 16, select 64, count 16, window 512, random caches. Microseconds of one layer's step,
appending included: median of replays over caches that together exceed the L2 cache. Dense is torch's SDPA, the query
against the whole context. The floor is the bytes that must be read (compressed keys and values, the chosen blocks, the
window) at the measured copy rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.nsa import CONFIG, SHAPES, milliseconds, rates
from plumbline.kernels.nsa import DecodePlan, NSACache, PhiParams, decode_step

LAYERS = 4


def graphed(run: Callable[[], object]) -> float:
    """Microseconds of one of the LAYERS runs that `run` makes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, 20) * 1e3 / LAYERS


@torch.no_grad()
def measure(shape: str, tokens: int, batch: int, copied: float, dense: bool) -> dict[str, float]:
    heads, kv_heads, dk, dv = SHAPES[shape]

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    caches = []
    for _ in range(LAYERS):
        cache = NSACache(batch, tokens, kv_heads, dk, dv, CONFIG, dtype=torch.bfloat16, device="cuda")
        for tensor in cache.tensors():
            tensor.normal_()
        caches.append(cache)
    params = PhiParams(
        *(random(kv_heads, CONFIG.block, d, *more) / 64 for d, more in ((dk, (dk,)), (dk, ()), (dv, (dv,)), (dv, ())))
    )
    # Half of the sequences complete a compression block in this step.
    position = torch.tensor([tokens - 1 - (b % 2) for b in range(batch)], device="cuda")
    slots = torch.arange(batch, device="cuda")
    q, gates = random(batch, heads, dk), torch.rand(batch, heads, 3, device="cuda").bfloat16()
    pair = random(batch, kv_heads, dk), random(batch, kv_heads, dv)

    def nsa() -> None:
        plan = DecodePlan(slots, position, CONFIG, tokens, longest=tokens)
        for cache in caches:
            decode_step(q, pair, pair, pair, gates, cache, plan, params)

    row = {"nsa_us": graphed(nsa)}
    read = (tokens - CONFIG.block) // CONFIG.stride + 1 + CONFIG.count * CONFIG.select_block + CONFIG.window
    row["floor_us"] = read * batch * kv_heads * (dk + dv) * 2 / copied * 1e6
    row["floor_share"] = row["floor_us"] / row["nsa_us"]
    for name, backend in (("fa2", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)) if dense else ():

        def whole() -> None:
            for cache in caches:
                k, v = cache.raw["slc"]
                F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                row[f"{name}_us"] = graphed(whole)
        except RuntimeError as error:
            print(f"{shape} {tokens}: {name} does not run: {str(error).splitlines()[0]}")
            torch.cuda.synchronize()
            continue
        row[f"x_{name}"] = row[f"{name}_us"] / row["nsa_us"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 65536])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-dense", action="store_true", help="leave out FlashAttention-2 and cuDNN")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    _, copied = rates()
    machine = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_tb_s": copied / 1e12,
    }
    print(json.dumps(machine))
    rows = []
    for shape in options.shapes:
        for tokens in options.tokens:
            row = measure(shape, tokens, options.batch, copied, not options.no_dense)
            rows.append({"shape": shape, "tokens": tokens, "batch": options.batch, **row})
            print(shape, tokens, "  ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
