"""The pipeline's selection: from the pre-run's history to the samples of the selected arm and of its random twin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plumbline.errors import InputError
from plumbline.rl.config import RunConfig
from plumbline.rl.tasks import TaskSet
from plumbline.selection.curves import VALUES
from plumbline.selection.facts import Facts, sample_facts
from plumbline.selection.history import curves
from plumbline.selection.methods import Selection, arm_name, curve_value, select_samples
from plumbline.selection.subset import nothing_kept


@dataclass
class Selected:
    """What the configured method made of the pre-run's history.

    Attributes:
        chosen: scores, rule and curves of every sample of the pre-run.
        kept: ids of the selected arm.
        random: as many ids drawn by the run's seed.
        value: what the curves measure, in words.
        warnings: what to know before trusting the selection.
    """

    chosen: Selection
    kept: list[str]
    random: list[str]
    value: str
    warnings: list[str]

    @property
    def scored(self) -> int:
        """Samples with a score."""
        return int((~np.isnan(self.chosen.scores)).sum())

    def lines(self) -> list[str]:
        """How many are kept and why, for a person."""
        chosen = self.chosen
        said = [
            f"{chosen.method} keeps {len(self.kept):,} of {len(chosen.sample_ids):,} samples: {chosen.rule} "
            f"({self.scored:,} have a score, over {chosen.curves.shape[1]} epochs); the random arm draws as many"
        ]
        return said + [f"warning: {warning}" for warning in self.warnings]


def arms(config: RunConfig) -> tuple[str, ...]:
    """Arms of a pipeline: all samples, a random subset, and the selected one of the same size."""
    return tuple(dict.fromkeys(("full", "random", arm_name(config.selection.method))))


def whole_epochs(config: RunConfig, samples: int) -> int:
    """Passes over the set that the pre-run completes. InputError for none."""
    epochs = config.selection.prerun_steps * config.rollout.prompts_per_step // samples
    if epochs == 0:
        raise InputError(
            f"selection.prerun_steps = {config.selection.prerun_steps} of {config.rollout.prompts_per_step} prompts do not see "
            f"each of the {samples:,} samples once; raise it to at least {-(-samples // config.rollout.prompts_per_step)}"
        )
    return epochs


def select(config: RunConfig, history: Path, full: TaskSet) -> Selected:
    """Score the recorded history and write selection/: kept and random ids, one a line, all scores as JSON, a report.

    Only whole epochs count: one that the pre-run's end cut short would leave gaps in most curves.

    Raises InputError when the method cannot score this history, or keeps nothing of it.
    """
    settings = config.selection
    value = curve_value(settings.method, settings.variant)
    sample_ids, table = curves(history, value=value, epochs=whole_epochs(config, len(full)))
    try:
        chosen = select_samples(
            settings.method,
            sample_ids,
            table,
            threshold=settings.threshold,
            high=settings.high,
            count=settings.count,
            share=settings.share,
            seed=config.seed,
            variant=settings.variant,
        )
    except ValueError as error:
        raise InputError(f"selection.method {settings.method}: {error}") from None
    if not chosen.kept.any():
        raise InputError(f"selection: {nothing_kept(chosen)}")
    kept = chosen.ids
    drawn = np.random.default_rng(config.seed).choice(np.array(sorted(full)), size=len(kept), replace=False)
    random = kept if settings.method == "random" else sorted(drawn.tolist())
    facts = sample_facts(history)
    selected = Selected(chosen, kept, random, VALUES[value], _warnings(config, chosen, facts))
    _write(config.folder / "selection", selected, facts, full)
    return selected


def _warnings(config: RunConfig, chosen: Selection, facts: Facts) -> list[str]:
    from plumbline.selection.selection_report import never_right_is_kept

    found = []
    if warning := never_right_is_kept(chosen):
        found.append(warning)
    kept = set(chosen.ids)
    suspect = sum(sample_id in kept for sample_id, bad in zip(facts.sample_ids, facts.suspect(), strict=True) if bad)
    if suspect:
        found.append(
            f"{suspect:,} of the {len(kept):,} kept samples are mostly ungradable: their curves are the grader's and not the "
            "policy's; run plumbline check on the pre-run and mend their golds"
        )
    if len(kept) < config.rollout.prompts_per_step:
        found.append(
            f"the {len(kept):,} kept samples are fewer than rollout.prompts_per_step = {config.rollout.prompts_per_step}: "
            "a step sees some of them more than once"
        )
    return found


def _write(folder: Path, selected: Selected, facts: Facts, full: TaskSet) -> None:
    from plumbline.selection.report import render_html
    from plumbline.selection.selection_report import sections

    chosen = selected.chosen
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in ((arm_name(chosen.method), selected.kept), ("random", selected.random)):
        (folder / f"{name}_ids.txt").write_text("".join(f"{sample_id}\n" for sample_id in ids), encoding="utf-8")
    scores = {
        sample_id: None if np.isnan(score) else float(score)
        for sample_id, score in zip(chosen.sample_ids, chosen.scores, strict=True)
    }
    average = None if chosen.average is None else chosen.average.tolist()
    (folder / "scores.json").write_text(json.dumps({"average": average, "scores": scores}, indent=1), encoding="utf-8")
    problems = {i: {"problem": full[i].problem.problem, **full[i].problem.extras} for i in full}
    parts = sections(
        chosen,
        value=selected.value,
        source=f"the pre-run's {facts.rows:,} graded completions",
        facts=facts,
        problems=problems,
    )
    page = render_html(f"Selection: {chosen.method}", parts)
    (folder / "report.html").write_text(page, encoding="utf-8")
