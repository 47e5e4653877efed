"""Our own modes of rl_step.py, each a function (settings, keep) for a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import floors
from benchmarks.processes import Keep
from benchmarks.rl_bench import DEVICE, Bench, Graders, machine, now, peak_gib
from plumbline.rl import records
from plumbline.rl.batch import Group, Prompt, Sampling
from plumbline.rl.learner import Learner
from plumbline.rl.learner_state import policy_weights
from plumbline.rl.rollout import RolloutEngine, make_engine


def native(settings: dict[str, Any], keep: Keep) -> None:
    """Our learner and our engine, and the share of the floor that they reach."""
    keep({"machine": machine()})
    rates = _rates(keep)
    last = _ours(Bench(settings), keep, "native")
    if last[1].policy.config.attention == "nsa":
        rates = None  # the floors are those of full attention
    _all_rows(*last, keep, rates)
    if rates is not None:
        bench, engine, _, groups = last
        _decode_floor(bench, engine, groups, keep, rates)


def native_alone(settings: dict[str, Any], keep: Keep) -> None:
    """Our engine answers each step's prompts; nothing is learnt. The rollout's share of the floor is that of the last
    window, answered once more."""
    keep({"machine": machine()})
    rates = _rates(keep)
    bench = Bench(settings)
    config = bench.config
    began = time.perf_counter()
    engine = make_engine(config, config.policy.path, config.policy.attention, bench.codec, DEVICE)
    keep({"engine": "native", "start_seconds": time.perf_counter() - began})
    steps: list[dict[str, float]] = []
    groups: list[Group] = []
    for window in bench.order:
        began = now()
        groups = list(_answers(bench, engine, window))
        seconds = now() - began
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        steps.append({"rollout": seconds, "completion_tokens": tokens, "rollout_tokens_per_second": tokens / seconds})
        keep(bench.summary(steps) | {"torch_peak_gib": peak_gib()})
    if rates is not None and config.policy.attention != "nsa":
        groups.sort(key=lambda group: group.prompt.index)
        _decode_floor(bench, engine, groups, keep, rates)


def _rates(keep: Keep) -> floors.Rates | None:
    """The card's own rates, measured and kept; None on a CPU."""
    rates = floors.Rates.measure()
    if rates is not None:
        keep({"rates": {"matmul_tflops": rates.flops / 1e12, "copy_tb_s": rates.copied / 1e12}})
    return rates


def vllm(settings: dict[str, Any], keep: Keep) -> None:
    """Our learner with vLLM as its engine, in one process."""
    keep({"machine": machine()})
    _ours(Bench(settings, "vllm"), keep, "vllm")


def _ours(bench: Bench, keep: Keep, name: str) -> tuple[Bench, Any, Learner, list[Group]]:
    config = bench.config
    began = time.perf_counter()
    engine = make_engine(config, config.policy.path, config.policy.attention, bench.codec, DEVICE)
    learner = Learner(config, DEVICE)
    keep({"engine": name, "start_seconds": time.perf_counter() - began})
    steps: list[dict[str, float]] = []
    groups: list[Group] = []
    with Graders(bench.settings["graders"]) as graders:
        for window in bench.order:
            record, groups = _our_step(bench, engine, learner, graders, window)
            steps.append(record)
            keep(bench.summary(steps) | {"torch_peak_gib": peak_gib()})
    return bench, engine, learner, groups


def _our_step(
    bench: Bench, engine: RolloutEngine, learner: Learner, graders: Graders, window: int
) -> tuple[dict[str, float], list[Group]]:
    began = now()
    groups, verdicts = [], []
    for group in _answers(bench, engine, window):
        groups.append(group)
        verdicts.append(graders.submit([(c.text, group.prompt.gold) for c in group.completions]))
    rolled_out = now()
    for group, graded in zip(groups, verdicts, strict=True):
        group.rewards = [float(verdict.correct) for verdict in graded.result()]
    groups.sort(key=lambda group: group.prompt.index)
    rewarded = now()
    metrics = learner.update(records.training_batch(groups))
    updated = now()
    engine.load_weights(learner.version, policy_weights(learner))
    synced = now()
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    record = {
        "step": synced - began,
        "rollout": rolled_out - began,
        "reward_wait": rewarded - rolled_out,
        "update": updated - rewarded,
        "sync": synced - updated,
        "completion_tokens": tokens,
        "prompt_tokens": sum(len(group.prompt.token_ids) for group in groups),
        "rollout_tokens_per_second": tokens / (rolled_out - began),
        "reward": statistics.fmean(r for group in groups for r in group.rewards),
        "groups_with_signal": sum(len(set(group.rewards)) > 1 for group in groups),
        "ratio_max": metrics["learner/ratio_max"],
        "ratio_mean": metrics["learner/ratio_mean"],
    }
    return record, groups


def _answers(bench: Bench, engine: RolloutEngine, window: int) -> Iterator[Group]:
    """The groups of one window's problems, in any order."""
    settings = bench.config.rollout
    prompts = [
        Prompt(index, row["id"], bench.codec.encode(row["problem"]), row["problem"], row["answer"], key=window)
        for index, row in enumerate(bench.problems(window))
    ]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, seed=0)
    return engine.generate(prompts, settings.completions_per_prompt, sampling)


def _all_rows(
    bench: Bench, engine: Any, learner: Learner, groups: list[Group], keep: Keep, rates: floors.Rates | None
) -> None:
    """The update where every group has a signal: ours leaves completions without a gradient out, and a weak policy has
    many of them. The rewards are made up for it."""
    for group in groups:
        group.rewards = [float(number % 2) for number in range(len(group.completions))]
    batch = records.training_batch(groups)
    seconds = []
    for _ in range(3):
        began = now()
        learner.update(batch)
        seconds.append(now() - began)
    measured = min(seconds[1:])
    record: dict[str, Any] = {"update_all_rows": {"each_seconds": seconds[1:]}}
    if rates is not None:
        shape = floors.Shape.of(learner.policy.config)
        rows = [(len(p), len(c)) for p, c in zip(batch.prompt_ids, batch.completion_ids, strict=True)]
        record["update_all_rows"] |= floors.update(shape, rows).shown(rates, measured)
    record["update_all_rows"]["torch_peak_gib"] = peak_gib()
    keep(record)


def _decode_floor(bench: Bench, engine: Any, groups: list[Group], keep: Keep, rates: floors.Rates) -> None:
    """The rollout once more, on the weights of the last step, and one captured step of all slots by itself."""
    config = bench.config.rollout
    prompts = [group.prompt for group in groups]
    began = now()
    made = list(engine.generate(prompts, config.completions_per_prompt, Sampling(config.max_new_tokens, seed=0)))
    seconds = now() - began
    made.sort(key=lambda group: group.prompt.index)
    shape = floors.Shape.of(engine.policy.config)
    lengths = [[len(c.token_ids) for c in group.completions] for group in made]
    work = floors.rollout(shape, [len(prompt.token_ids) for prompt in prompts], lengths)
    record: dict[str, Any] = {"rollout_floor": work.shown(rates, seconds)}
    decoder = engine.decoder
    if decoder is not None:
        # Every slot half-way through its completion, and none that ends.
        half = min(128, config.max_new_tokens // 2)
        slots = list(range(decoder.slots))
        tokens = [len(prompts[slot // config.completions_per_prompt].token_ids) + half for slot in slots]
        decoder.cache.lengths[: decoder.slots] = torch.tensor(tokens, device=DEVICE)
        decoder.state.counts[: decoder.slots] = 0
        decoder.state.finished[: decoder.slots] = 0
        ends, decoder.state.end_ids[:] = decoder.state.end_ids.clone(), -1
        decoder.advance(slots, 4)
        count = min(64, config.max_new_tokens - 8)
        began = now()
        decoder.advance(slots, count)
        a_step = (now() - began) / count
        decoder.state.end_ids.copy_(ends)
        decoder.state.finished[: decoder.slots] = 1
        work = floors.decode_step(shape, [n + 4 + count // 2 for n in tokens])
        record["decode_step"] = {"rows": decoder.slots, **work.shown(rates, a_step)}
    keep(record)
