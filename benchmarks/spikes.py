"""Gradient clipping under planted spikes: none, global norm, ZClip and AdaGC, with and without corrupted batches.

    python benchmarks/spikes.py --out benchmarks/results/spikes.json

A small decoder learns worked solutions of procedural problems by next-token prediction. In the corrupted runs every
40th batch after warm-up has random tokens for targets and a loss 20 times as large (a broken shard, a loss that sums).
After each step the loss on a fixed clean batch is measured. Reported per method, over seeds: the final clean loss, the
rise of the clean loss over the five steps after a corrupted batch, and the spike score (share of values at least 10
standard deviations from the rolling mean of up to 1,000 values before) of the clean loss and of the gradient norm.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plumbline.models.policy import Policy
from plumbline.rl import coldstart
from plumbline.rl.clipping import make_clipper
from plumbline.rl.logprobs import token_logprobs
from plumbline.rl.procedural import generate
from plumbline.rl.sections import ClippingSection

METHODS = {
    "none": ClippingSection(method="none"),
    "global": ClippingSection(method="global", max_norm=1.0),
    "zclip": ClippingSection(method="zclip", max_norm=1.0, threshold=2.5, alpha=0.97, warmup_steps=25),
    "adagc": ClippingSection(method="adagc", max_norm=1.0, relative=1.05, beta=0.98, warmup_steps=100),
}
FIRST_SPIKE, SPIKE_EVERY, SPIKE_SCALE = 140, 40, 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (method, seed, corrupted, arguments.steps)
        for corrupted in (False, True)
        for method in METHODS
        for seed in range(arguments.seeds)
    ]
    began = time.monotonic()
    with Pool(arguments.processes) as pool:
        runs = pool.starmap(run, jobs)
    table = [
        summary(method, corrupted, [r for r in runs if (r["method"], r["corrupted"]) == (method, corrupted)])
        for corrupted in (False, True)
        for method in METHODS
    ]
    print(f"{arguments.steps} steps, {arguments.seeds} seeds, {time.monotonic() - began:.0f} s")
    columns = ("final_loss", "rise_after_spike", "loss_spike_score", "norm_spike_score")
    print(f"{'batches':10s} {'clipping':8s} " + " ".join(f"{name:>24s}" for name in columns))
    for row in table:
        shown = (f"{row[name]['mean']:.4f} ± {row[name]['std']:.4f}" for name in columns)
        print(f"{row['batches']:10s} {row['clipping']:8s} " + " ".join(f"{text:>24s}" for text in shown))
    if arguments.out:
        work = {"steps": arguments.steps, "seeds": arguments.seeds, "torch": torch.__version__, "table": table}
        arguments.out.write_text(json.dumps(work, indent=1) + "\n", encoding="utf-8")


def run(method: str, seed: int, corrupted: bool, steps: int) -> dict[str, Any]:
    """One training run; its clean losses and gradient norms, one a step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    problems = generate("train", 4000, seed)
    recipe = coldstart.Recipe(vocab=300, hidden=96, intermediate=256, layers=3, heads=4, kv_heads=2, head_dim=24)
    tokenizer = coldstart.train_tokenizer(problems[:1000], recipe.vocab)
    policy = Policy(coldstart.policy_config(tokenizer, recipe)).train()
    rows = [tokenizer(f"{p.problem}\n{p.solution}")["input_ids"][:128] for p in problems]
    held_out, rows = rows[:64], rows[64:]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, betas=(0.9, 0.95))
    clipper = make_clipper(METHODS[method], policy)
    rng = np.random.default_rng(seed)
    losses, norms, spikes = [], [], []
    for step in range(steps):
        batch = [rows[i] for i in rng.integers(0, len(rows), 32)]
        spike = corrupted and step >= FIRST_SPIKE and (step - FIRST_SPIKE) % SPIKE_EVERY == 0
        optimizer.zero_grad()
        loss = next_token_loss(policy, batch, rng if spike else None)
        (loss * (SPIKE_SCALE if spike else 1.0)).backward()
        norms.append(clipper.clip().item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        with torch.no_grad():
            losses.append(next_token_loss(policy, held_out, None).item())
        if spike:
            spikes.append(step)
    rises = [max(losses[s : s + 5]) - losses[s - 1] for s in spikes]
    return {
        "method": method,
        "corrupted": corrupted,
        "final_loss": float(np.mean(losses[-10:])),
        "rise_after_spike": float(np.mean(rises)) if rises else 0.0,
        "loss_spike_score": spike_score(losses),
        "norm_spike_score": spike_score(norms),
    }


def next_token_loss(policy: Policy, batch: list[list[int]], rng: np.random.Generator | None) -> torch.Tensor:
    """Mean negative log-probability of each next token; with an rng, of random tokens instead."""
    ids = torch.tensor([token for row in batch for token in row[:-1]])
    targets = [token for row in batch for token in row[1:]]
    if rng is not None:
        targets = rng.integers(0, policy.config.vocab_size, len(targets)).tolist()
    ends = torch.tensor(np.cumsum([0] + [len(row) - 1 for row in batch]), dtype=torch.int32)
    logprobs, _ = token_logprobs(policy.hidden_states(ids, ends), torch.tensor(targets), policy.lm_head)
    return -logprobs.mean()


def spike_score(values: list[float], window: int = 1000, burn_in: int = 100) -> float:
    """Share of values at least 10 standard deviations from the mean of up to `window` before (arXiv 2502.11034)."""
    hits = 0
    for t in range(burn_in, len(values)):
        before = np.array(values[max(0, t - window) : t])
        hits += abs(values[t] - before.mean()) >= 10 * before.std()
    return hits / max(1, len(values) - burn_in)


def summary(method: str, corrupted: bool, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"batches": "corrupted" if corrupted else "clean", "clipping": method, "n": len(runs)}
    for name in ("final_loss", "rise_after_spike", "loss_spike_score", "norm_spike_score"):
        values = np.array([run[name] for run in runs])
        row[name] = {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
    return row


if __name__ == "__main__":
    main()
