"""Policies in vLLM against the native engine: the same greedy tokens, and decoding speed at long contexts.

    PYTHONPATH=. python benchmarks/vllm_nsa.py --nsa OUT_NSA [--dense OUT_DENSE] [--contexts 8192 32768] [--batch 8]

Both are policy folders (`plumbline convert smollm2 OUT_NSA`, `... --attention full`). Each engine runs each policy in a
process of its own, one after the other; a result is written to --out as soon as it is there, so that a run cut short
keeps what it has.

Agreement: greedy completions of prompts of --prompt-tokens tokens (the texts of docs/, or random tokens for a folder
without a tokenizer) compared token by token; at the first difference, how far vLLM's token lies behind the native one
under the packed forward of the same weights: a near-tie (under NEAR_TIE nats) is rounding, which --dtype float32 leaves
little of.

Speed: tokens a second of the whole engine while --batch sequences of random tokens decode, from the difference between
a long and a short completion, the shortest of three runs each; reading the prompts, which varies most, is in both.
Contexts beyond the policy's positions are run all the same: their text means nothing, their speed does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

# The last: without CUDA graphs for the sparse policy (the dense one has them in any case, but for --eager).
ENGINES = ("native", "vllm", "vllm-eager")
NEAR_TIE = 0.05
SHORT = 8
REPEATS = 3
KEPT = 8  # most likely tokens kept of each position


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nsa", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--engines", nargs="+", default=["native", "vllm"], choices=ENGINES)
    parser.add_argument("--contexts", nargs="*", type=int, default=[8192, 32768], help="none: agreement alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="timed tokens of a sequence")
    parser.add_argument("--prompts", type=int, default=8, help="of the agreement; 0 leaves it out")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--new", type=int, default=128, help="tokens compared of a prompt")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--eager", action="store_true", help="vLLM without CUDA graphs for the dense policy too")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a process")
    parser.add_argument("--out", type=Path, default=Path("vllm_nsa.jsonl"))
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.nsa is None and args.dense is None:
        parser.error("give --nsa or --dense")
    return args


class Words:
    """A codec of nothing but numbers, with no end token."""

    end_ids = frozenset([-1])

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()


def text_prompts(folder: Path, count: int, length: int, vocabulary: int) -> list[list[int]]:
    from plumbline.models.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        return random_prompts(count, length, vocabulary)
    files = sorted(Path(__file__).resolve().parents[1].glob("docs/*.md"))
    ids = tokenizer.encode("\n\n".join(file.read_text() for file in files))
    step = max(1, (len(ids) - length) // max(1, count - 1))
    return [ids[i * step : i * step + length] for i in range(count)]


class Native:
    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        from plumbline.rl.rollout.native import NativeEngine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        slots = max(args.batch, args.prompts)
        self.engine = NativeEngine(
            str(folder), attention=None, codec=Words(), slots=slots, device=device, dtype=getattr(torch, args.dtype)
        )

    def complete(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        from plumbline.rl.batch import Prompt, Sampling

        asked = [Prompt(i, str(i), ids, "", "") for i, ids in enumerate(prompts)]
        groups = self.engine.generate(asked, 1, Sampling(max_new_tokens=new, temperature=0.0))
        return [g.completions[0].token_ids for g in sorted(groups, key=lambda g: g.prompt.index)]

    @torch.no_grad()
    def likely(self, prompt: list[int], tokens: list[int]) -> list[dict[int, float]]:
        """Log-probabilities of the KEPT likeliest tokens at each position of a completion, teacher-forced."""
        policy = self.engine.policy
        ids = torch.tensor(prompt + tokens, device=policy.device)
        ends = torch.tensor([0, len(ids)], dtype=torch.int32, device=policy.device)
        hidden = policy.hidden_states(ids, ends)[len(prompt) - 1 : -1]
        values, found = policy.lm_head(hidden).float().log_softmax(-1).topk(KEPT)
        return [dict(zip(row, at, strict=True)) for row, at in zip(found.tolist(), values.tolist(), strict=True)]


class Served:
    def __init__(self, folder: Path, args: argparse.Namespace, graphs: bool) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        import vllm

        from plumbline.models.load import policy_config
        from plumbline.models.vllm import register

        register()
        longest = max([args.prompt_tokens + args.new, *(n + 1 + SHORT + args.tokens for n in args.contexts)])
        sparse = policy_config(folder).attention == "nsa"
        device: dict[str, Any] = {"gpu_memory_utilization": 0.8}
        if not torch.cuda.is_available():
            device = {"kv_cache_memory_bytes": 1 << 30, "block_size": 32}
        self.version = vllm.__version__
        self.llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=max(args.batch, args.prompts),
            max_num_batched_tokens=longest,  # a prompt is read whole
            enable_prefix_caching=True,
            enforce_eager=args.eager or (sparse and not graphs) or not torch.cuda.is_available(),
            additional_config={"nsa_graphs": graphs},
            disable_log_stats=True,
            seed=0,
            **device,
        )
        self.cached: list[int] = []

    def complete(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]


def timed(engine: Native | Served, prompts: list[list[int]], new: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    engine.complete(prompts, new)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def part(args: argparse.Namespace, kind: str, attention: str) -> None:
    """One engine with one policy: a JSON line for each result."""
    from plumbline.models.load import policy_config

    started = time.perf_counter()
    folder = getattr(args, attention)
    vocabulary = policy_config(folder).vocab_size
    engine = Native(folder, args) if kind == "native" else Served(folder, args, kind == "vllm")
    common = {"engine": kind, "attention": attention, "dtype": args.dtype, "torch": torch.__version__}
    common["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if isinstance(engine, Served):
        common["vllm"] = engine.version

    def say(**figures: Any) -> None:
        with args.out.open("a") as file:
            file.write(json.dumps({**common, **figures}) + "\n")

    say(what="start", seconds=time.perf_counter() - started)
    if args.prompts:
        prompts = text_prompts(folder, args.prompts, args.prompt_tokens, vocabulary)
        completions = engine.complete(prompts, args.new)
        likely = None
        if isinstance(engine, Native):
            likely = [engine.likely(ids, tokens) for ids, tokens in zip(prompts, completions, strict=True)]
        say(what="tokens", tokens=completions, likely=likely, seconds=time.perf_counter() - started)
    for context in args.contexts:
        # One token more than the context: all the rest may come from vLLM's prefix cache, whose pages divide it.
        prompts = random_prompts(args.batch, context + 1, vocabulary)
        seconds = {}
        for new in (SHORT, SHORT + args.tokens):
            engine.complete(prompts, new)  # compiles, captures, and fills the prefix cache
            seconds[new] = min(timed(engine, prompts, new) for _ in range(REPEATS))
        step = (seconds[SHORT + args.tokens] - seconds[SHORT]) / args.tokens
        cached = min(engine.cached) if isinstance(engine, Served) else None
        say(
            what="speed",
            context=context,
            batch=args.batch,
            tokens_per_second=args.batch / step if step > 0 else None,
            milliseconds=step * 1e3,
            short_seconds=seconds[SHORT],
            cached=cached,
            seconds=time.perf_counter() - started,
        )


def compare(native: dict[str, Any], served: dict[str, Any]) -> dict[str, Any]:
    """How far two sets of completions agree."""
    first, behind, equal, total = [], [], 0, 0
    for ours, theirs, likely in zip(native["tokens"], served["tokens"], native["likely"], strict=True):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=True)))
        equal, total = equal + same, total + len(ours)
        first.append(same if same < len(ours) else None)
        if same < len(ours):
            at = {int(token): value for token, value in likely[same].items()}
            known = {ours[same], theirs[same]} <= at.keys()
            behind.append(at[ours[same]] - at[theirs[same]] if known else float("inf"))
    return {
        "what": "agreement",
        "engine": served["engine"],
        "attention": native["attention"],
        "dtype": native["dtype"],
        "prompts": len(first),
        "equal_before_first_difference": equal / max(1, total),
        "whole": sum(at is None for at in first),
        "first_difference": first,
        "nats_behind": behind,
        "near_ties": sum(abs(gap) < NEAR_TIE for gap in behind),
    }


def shown(record: dict[str, Any]) -> str | None:
    if record["what"] == "speed":
        cached = "" if record["cached"] is None else f", {record['cached']:,} cached"
        rate = record["tokens_per_second"]
        return (
            f"{record['engine']:11} {record['attention']:6} context {record['context']:>6} batch {record['batch']:>3}: "
            f"{'lost in noise' if rate is None else f'{rate:9.1f} tokens/s'}, {record['milliseconds']:7.3f} ms a step "
            f"(prompts and {SHORT} tokens {record['short_seconds']:.2f} s{cached})"
        )
    if record["what"] == "agreement":
        name = f"{record['engine']:11} {record['attention']:6} {record['dtype']}"
        behind = ", ".join(f"{gap:.4f}" for gap in record["nats_behind"])
        return (
            f"{name}: {record['whole']} of {record['prompts']} completions equal, "
            f"{record['equal_before_first_difference']:.1%} of tokens before a first difference; "
            f"{record['near_ties']} of {len(record['nats_behind'])} first differences near-ties (nats behind: {behind})"
        )
    return None


class Part:
    """A process that imports what it needs at once, and begins when told to: imports cost as much time as measuring."""

    def __init__(self, kind: str, attention: str, *more: str) -> None:
        self.kind, self.attention, self.name = kind, attention, f"{kind:11} {attention:6}"
        command = [sys.executable, __file__, *sys.argv[1:], *more, "--part", kind, attention]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def run(self, args: argparse.Namespace) -> int | str:
        """The exit code; prints what it found."""
        done = len(read(args))
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code: int | str = self.process.wait(args.limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = f"none in {args.limit} s"
        for record in read(args)[done:]:
            print(shown(record) or f"{self.name} {record['what']} after {record['seconds']:.1f} s", flush=True)
        return code


def read(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []


def main() -> None:
    args = arguments()
    if args.part:
        kind = args.part[0]
        import_all(kind)
        sys.stdin.read()  # until the parent closes it
        part(args, *args.part)
        return
    args.out.unlink(missing_ok=True)
    wanted = [
        (kind, attention)
        for attention in ("nsa", "dense")
        for kind in args.engines
        if getattr(args, attention) is not None
        and not (attention == "dense" and kind == "vllm-eager" and "vllm" in args.engines)  # the same
    ]
    failed = False
    coming = Part(*wanted[0])
    for following in [*wanted[1:], None]:
        now = coming
        if following is not None:
            coming = Part(*following)
        code = now.run(args)
        if code and (now.kind, now.attention) == ("vllm", "dense") and not args.eager:
            print(f"{now.name} exit code {code}; once more, without CUDA graphs", flush=True)
            code = Part(now.kind, now.attention, "--eager").run(args)
        if code:
            failed = True
            print(f"{now.name} FAILED, exit code {code}", flush=True)
        tokens = {r["engine"]: r for r in read(args) if r["what"] == "tokens" and r["attention"] == now.attention}
        if now.kind != "native" and {"native", now.kind} <= tokens.keys():
            agreement = compare(tokens["native"], tokens[now.kind])
            with args.out.open("a") as file:
                file.write(json.dumps(agreement) + "\n")
            print(shown(agreement), flush=True)
    sys.exit(failed)


def import_all(kind: str) -> None:
    import plumbline.rl.rollout.native  # noqa: F401

    if kind != "native":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm  # noqa: F401
        from vllm.v1.engine.llm_engine import LLMEngine  # noqa: F401


if __name__ == "__main__":
    main()
