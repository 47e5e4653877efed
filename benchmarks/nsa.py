"""Times Native Sparse Attention against dense attention on one card.

    PYTHONPATH=. python benchmarks/nsa.py [--shapes A B C] [--tokens 65536] [--parts] [--json PATH]

Batch 1, causal, bfloat16, block 32, stride 16, select 64, count 16, window 512, random inputs. Prints milliseconds
(median), the ratio to FlashAttention-2 and to cuDNN attention (torch SDPA back ends), the share of the floor
(floating-point operations at the measured matrix rate, or bytes at the measured copy rate, whichever is longer) and
peak memory over the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from plumbline.kernels.nsa import Layout, NSAConfig, PhiParams, native_sparse_attention

SHAPES = {
    "A": (64, 4, 128, 128),
    "B": (16, 1, 128, 128),
    "C": (16, 4, 64, 64),
    "paper": (64, 4, 192, 128),
    "qwen": (12, 2, 128, 128),
    "smollm": (9, 3, 64, 64),
}
CONFIG = NSAConfig()


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time on the device, the host staying ahead of it.

    Short runs are made more often: the first launches take the host longer than the device.
    """
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    if time.perf_counter() - began < 0.02:
        repeats = max(repeats, 30)
        for _ in range(10):
            run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairwise(marks))


def rates() -> tuple[float, float]:
    """(matrix FLOP/s in bfloat16, copied bytes/s counting read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / milliseconds(lambda: a @ b, 10) * 1e3
    x = torch.randn(2**30, device="cuda")
    y = torch.empty_like(x)
    return flops, 2 * 4 * x.numel() / milliseconds(lambda: y.copy_(x), 10) * 1e3


class Case:
    """Random inputs of a shape, and the calls that are timed."""

    def __init__(self, shape: str, tokens: int) -> None:
        self.heads, self.kv_heads, self.dk, self.dv = SHAPES[shape]
        self.tokens = tokens

        def leaf(*sizes: int, factor: float = 1.0) -> torch.Tensor:
            return (torch.randn(*sizes, device="cuda") * factor).bfloat16().requires_grad_()

        self.q = leaf(tokens, self.heads, self.dk)
        self.kv = [(leaf(tokens, self.kv_heads, self.dk), leaf(tokens, self.kv_heads, self.dv)) for _ in range(3)]
        self.gates = torch.rand(tokens, self.heads, 3, device="cuda").bfloat16().requires_grad_()
        phi = [
            (
                leaf(self.kv_heads, CONFIG.block, d, d, factor=(CONFIG.block * d) ** -0.5),
                leaf(self.kv_heads, CONFIG.block, d),
            )
            for d in (self.dk, self.dv)
        ]
        self.params = PhiParams(*phi[0], *phi[1])
        self.cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        self.layout = Layout(self.cu_seqlens)
        self.d_out = torch.randn(tokens, self.heads, self.dv, device="cuda").bfloat16()
        self.leaves = [self.q, *(t for pair in self.kv for t in pair), self.gates, *self.params]

    def nsa(self) -> torch.Tensor:
        out = native_sparse_attention(
            self.q, *self.kv, self.gates, self.cu_seqlens, self.params, CONFIG, layout=self.layout
        )
        assert isinstance(out, torch.Tensor)
        return out

    def both(self, forward: Callable[[], torch.Tensor]) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        out = forward()
        out.backward(self.d_out if out.ndim == 3 else self.d_out.transpose(0, 1)[None])

    def dense(self, pad: bool = False) -> torch.Tensor:
        """Full attention over the first pair; pad: values brought to the keys' dim, which FlashAttention-2 asks for."""
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, *self.kv[0]))
        if pad:
            v = F.pad(v, (0, self.dk - self.dv))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[..., : self.dv]

    def floor(self, flops: float, copied: float) -> tuple[float, float]:
        """(forward, forward and backward) milliseconds: the work of exact NSA, each input and output once."""
        t, c = self.tokens, CONFIG
        visible = sum(max(0, (i - c.block + 1) // c.stride + 1) if i >= c.block - 1 else 0 for i in range(t))
        chosen = sum(min(i + 1, (c.count - 1) * c.select_block + i % c.select_block + 1) for i in range(t))
        near = sum(min(i + 1, c.window) for i in range(t))
        pairs = visible + chosen + near
        forward = 2 * self.heads * (pairs * (self.dk + self.dv) + visible * self.dk)
        backward = 2 * self.heads * pairs * (3 * self.dk + 2 * self.dv)
        inputs = 2 * t * (self.heads * (self.dk + self.dv) + 3 * self.kv_heads * (self.dk + self.dv))
        first = max(forward / flops, inputs / copied)
        return first * 1e3, (first + max(backward / flops, 2 * inputs / copied)) * 1e3


def parts(run: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel in one run."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        total[event.key[:60]] += event.device_time_total / 1e3
    return dict(sorted(total.items(), key=lambda item: -item[1])[:14])


def measure(shape: str, tokens: int, flops: float, copied: float, dense: bool) -> dict[str, float]:
    case = Case(shape, tokens)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    row = {"nsa_forward": milliseconds(case.nsa)}
    torch.cuda.reset_peak_memory_stats()
    row["nsa_both"] = milliseconds(lambda: case.both(case.nsa))
    row["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
    floor_forward, floor_both = case.floor(flops, copied)
    row["floor_forward"], row["floor_both"] = floor_forward, floor_both
    row["floor_share_forward"] = floor_forward / row["nsa_forward"]
    row["floor_share_both"] = floor_both / row["nsa_both"]
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION} if dense else {}
    for name, backend in backends.items():
        run = partial(case.dense, pad=name == "fa2" and case.dk != case.dv)
        try:
            with sdpa_kernel(backend):
                forward = milliseconds(run, 2)
                both = milliseconds(partial(case.both, run), 2)
        except RuntimeError as error:
            print(f"{shape} {tokens}: {name} does not run: {str(error).splitlines()[0]}")
            continue
        row[f"{name}_forward"], row[f"{name}_both"] = forward, both
        row[f"x_{name}_forward"] = row[f"{name}_forward"] / row["nsa_forward"]
        row[f"x_{name}_both"] = row[f"{name}_both"] / row["nsa_both"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A", "B", "C"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[65536])
    parser.add_argument("--parts", action="store_true", help="also print the time of each kernel")
    parser.add_argument("--no-dense", action="store_true", help="leave out FlashAttention-2 and cuDNN")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    flops, copied = rates()
    machine = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "matmul_tflops": flops / 1e12,
        "copy_tb_s": copied / 1e12,
    }
    print(json.dumps(machine))
    rows = []
    for shape in options.shapes:
        for tokens in options.tokens:
            row = measure(shape, tokens, flops, copied, not options.no_dense)
            rows.append({"shape": shape, "tokens": tokens, **{k: round(v, 4) for k, v in row.items()}})
            print(shape, tokens, "  ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
            if options.parts:
                case = Case(shape, tokens)
                rows[-1]["parts_ms"] = parts(lambda case=case: case.both(case.nsa))
                for name, time in rows[-1]["parts_ms"].items():
                    print(f"    {time:8.3f} ms  {name}")
    if options.json:
        options.json.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
