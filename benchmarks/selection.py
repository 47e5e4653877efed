"""A simulator of learners: selection methods compared at equal rollouts, and at equal total rollouts, with seeds and
intervals.

A problem needs a mix of skills and has a difficulty; the learner's chance of solving it is a logistic function of the
skills it has, less the difficulty. Training moves skills as a policy gradient with group advantages would: each mixed
group pushes the skills its problem needs, in proportion to p (1 - p) of the group as rolled out; all-right and
all-wrong groups push nothing. Skills help each other a little (transfer). Some golds are bad: never graded correct,
whatever the learner does, and their groups cost as much as others. Held-out accuracy is over problems drawn from the
same distribution, without bad golds.

What this shows is how methods spend rollouts on learners of this kind, whose constants are stated below. It is not
evidence that a method helps a language model; docs/selection.md has runs of real policies.

    python benchmarks/selection.py --seeds 20
    python benchmarks/selection.py --seeds 20 --output benchmarks/results/selection.md
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from plumbline.selection.dynamic_samplers import SAMPLERS, SpeedSampler
from plumbline.selection.methods import select_samples
from plumbline.selection.samplers import CurriculumSampler, Draw, Sampler, UniformSampler, collect


@dataclass(frozen=True)
class World:
    """Constants of the simulation.

    Attributes:
        samples, held_out: problems to train on and to test on.
        skills: independent abilities; each problem needs `needs` of them.
        spread: standard deviation of the difficulty, in logits.
        start: skill at first, in logits below the mean difficulty.
        bad_golds: share of training problems that are never graded correct.
        rate: how far a fully mixed group moves the skills it needs.
        transfer: share of a push that every other skill gets.
        groups, completions: prompts a step, rollouts a prompt.
        budget: rollouts of an arm.
        prerun_epochs: epochs of the run that records LIM's history.
    """

    samples: int = 600
    held_out: int = 2000
    skills: int = 12
    needs: int = 2
    spread: float = 2.0
    start: float = -1.0
    bad_golds: float = 0.1
    rate: float = 0.006
    transfer: float = 0.1
    groups: int = 32
    completions: int = 8
    budget: int = 80_000
    prerun_epochs: int = 6


class Learner:
    """Skills that move, on a fixed set of problems."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        problems = np.random.default_rng([seed, 0])
        n = world.samples + world.held_out
        self.uses = np.zeros((n, world.skills))
        for row in self.uses:
            row[problems.choice(world.skills, world.needs, replace=False)] = 1 / world.needs
        self.difficulty = problems.normal(0, world.spread, n)
        self.bad = np.zeros(n, dtype=bool)
        self.bad[: world.samples] = problems.random(world.samples) < world.bad_golds
        self.ids = [f"p{i}" for i in range(world.samples)]
        self.place = {sample_id: i for i, sample_id in enumerate(self.ids)}
        self.skill = np.full(world.skills, world.start)
        self.rng = np.random.default_rng([seed, 1])
        self.rollouts = 0

    def solve(self, places: np.ndarray | slice) -> np.ndarray:
        """Chance of a correct answer, bad golds apart."""
        return 1 / (1 + np.exp(self.difficulty[places] - self.uses[places] @ self.skill))

    def roll_out(self, asked: list[tuple[Draw, int]]) -> list[list[bool]]:
        """Graded rollouts of the current policy."""
        places = np.array([self.place[draw.sample_id] for draw, _ in asked])
        p = np.where(self.bad[places], 0.0, self.solve(places))
        self.rollouts += sum(number for _, number in asked)
        return [(self.rng.random(number) < chance).tolist() for (_, number), chance in zip(asked, p, strict=True)]

    def learn(self, groups: list[tuple[Draw, list[bool]]]) -> None:
        """One training step."""
        push = np.zeros(self.world.skills)
        for draw, correct in groups:
            share = float(np.mean(correct))
            push += 4 * share * (1 - share) * self.uses[self.place[draw.sample_id]]
        push *= self.world.rate * self.world.needs
        self.skill += push + self.world.transfer * (push.sum() - push) / (self.world.skills - 1)

    def accuracy(self) -> float:
        """Expected accuracy on held-out problems."""
        return float(self.solve(slice(self.world.samples, None)).mean())


def train(learner: Learner, sampler: Sampler, budget: int) -> float:
    """Spend `budget` rollouts (dropped groups included) and return held-out accuracy."""
    world = learner.world
    spent, pending = 0, None
    while spent + world.groups * world.completions <= budget:
        batch = collect(sampler, world.groups, world.completions, learner.roll_out, pending=pending, max_rounds=4)
        pending = batch.pending
        spent += batch.rollouts
        learner.learn(batch.groups)
    return learner.accuracy()


def record(world: World, seed: int, epochs: int) -> tuple[list[str], np.ndarray, int]:
    """Reward curves of a uniform run on everything: (ids, curves [N, K], rollouts spent)."""
    learner = Learner(world, seed)
    sampler = UniformSampler(learner.ids, seed)
    curves = np.full((world.samples, epochs), np.nan)
    left = world.samples * epochs
    while left:
        batch = collect(sampler, min(world.groups, left), world.completions, learner.roll_out)
        learner.learn(batch.groups)
        for draw, correct in batch.groups:
            curves[learner.place[draw.sample_id], draw.epoch] = np.mean(correct)
        left -= len(batch.groups)
    return learner.ids, curves, learner.rollouts


def offline(world: World, seed: int) -> dict[str, tuple[list[str], int]]:
    """Method -> (subset, rollouts it cost to find). All the size of LIM's, or near it for the pass-rate band."""
    ids, curves, cost = record(world, seed, world.prerun_epochs)
    first = cost // world.prerun_epochs
    lim = select_samples("lim", ids, curves).ids
    size = len(lim)
    found = {"full": (ids, 0), "lim": (lim, cost)}
    for name, price in (("random", 0), ("linear", cost), ("variance", cost), ("p(1-p)", cost)):
        found[name] = (select_samples(name, ids, curves, count=size, seed=seed).ids, price)
    # The band needs one epoch of rollouts from the start and no training, so it asks the untrained policy.
    untrained = Learner(replace(world, rate=0.0), seed)
    asked = [(Draw(sample_id, 0), world.completions) for sample_id in untrained.ids]
    rates = np.array([np.mean(correct) for correct in untrained.roll_out(asked)])[:, None]
    found["pass_rate"] = (select_samples("pass_rate", ids, rates, threshold=0.1, high=0.9).ids, first)
    return found


def online(world: World, learner: Learner, seed: int) -> dict[str, Callable[[], Sampler]]:
    """Sampler name -> maker, on the full set."""
    levels = {i: float(d) for i, d in zip(learner.ids, learner.difficulty[: world.samples], strict=True)}
    makers: dict[str, Callable[[], Sampler]] = {
        name: partial(SAMPLERS[name], learner.ids, seed) for name in ("prioritised", "dynamic", "greso")
    }
    makers["curriculum"] = lambda: CurriculumSampler(learner.ids, seed, difficulty=levels)
    makers["speed"] = lambda: SpeedSampler(learner.ids, seed, screening=2, completions=world.completions)
    return makers


def compare(world: World, seeds: int) -> dict[str, dict[str, list[float]]]:
    """arm -> {`equal`, `total`: accuracy of each seed, `size`: of its subset}."""
    results: dict[str, dict[str, list[float]]] = {}

    def note(arm: str, equal: float, total: float, size: int) -> None:
        entry = results.setdefault(arm, {"equal": [], "total": [], "size": []})
        entry["equal"].append(equal)
        entry["total"].append(total)
        entry["size"].append(size)

    for seed in range(seeds):
        start = Learner(world, seed)
        note("base (untrained)", start.accuracy(), start.accuracy(), 0)
        for arm, (subset, price) in offline(world, seed).items():
            equal, total = (
                train(Learner(world, seed), UniformSampler(subset, seed), budget)
                for budget in (world.budget, world.budget - price)
            )
            note(arm, equal, total, len(subset))
        for arm, maker in online(world, start, seed).items():
            score = train(Learner(world, seed), maker(), world.budget)
            note(f"{arm} (online)", score, score, world.samples)
    return results


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high), 95% bootstrap over seeds."""
    array = np.array(values)
    means = np.random.default_rng(0).choice(array, (4000, len(array))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: accuracy in percent and the paired difference to `full`, at both ways of counting."""
    full = results["full"]
    lines = [
        "| arm | subset | equal rollouts | over full | equal total rollouts | over full |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, entry in sorted(results.items(), key=lambda item: -np.mean(item[1]["total"])):
        cells = [arm, f"{np.mean(entry['size']):.0f}"]
        for kind in ("equal", "total"):
            mean, low, high = interval([100 * value for value in entry[kind]])
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
            gap, low, high = interval([100 * (a - b) for a, b in zip(entry[kind], full[kind], strict=True)])
            cells.append("-" if arm == "full" else f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compare and print; with --output, also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="worlds to simulate")
    parser.add_argument("--budget", type=int, default=World.budget, help="rollouts of an arm")
    parser.add_argument(
        "--bad-golds", type=float, default=World.bad_golds, help="share of golds that grade nothing correct"
    )
    parser.add_argument("--output", type=Path, help="write the table there as Markdown")
    options = parser.parse_args()
    world = World(budget=options.budget, bad_golds=options.bad_golds)
    began = time.perf_counter()
    text = table(compare(world, options.seeds))
    seconds = time.perf_counter() - began
    note = (
        f"Held-out accuracy in percent, mean and 95% bootstrap interval over {options.seeds} seeds (simulation, "
        f"{world.held_out} held-out problems each). {world.samples} to train on, {world.bad_golds:.0%} bad golds; "
        f"{world.budget:,} rollouts an arm. Equal rollouts leaves out what a method spent to choose; equal total "
        "rollouts takes it off the arm's budget (LIM, LINEAR, variance, p(1-p): a run of "
        f"{world.prerun_epochs} epochs; pass_rate: {world.completions} rollouts a problem). {seconds:.0f} s on one "
        f"core; Python {platform.python_version()}, NumPy {np.__version__}."
    )
    print(f"{text}\n\n{note}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(f"# Selection methods on simulated learners\n\n{text}\n\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
