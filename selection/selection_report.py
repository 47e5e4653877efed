"""The report of `plumbline select`: what was kept and why, and what to know before trusting it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from plumbline.selection import figures
from plumbline.selection.facts import Facts
from plumbline.selection.methods import Selection, select_samples
from plumbline.selection.report import Section

# Columns of the problems that make groups, where they are there.
GROUPS = ("level", "source", "subject", "family", "type")
MOST_GROUPS = 20
SHOWN_SAMPLES = 12
GLOSSARY = (
    "A reward curve is a sample's success rate at each epoch of the recorded run; the average learning curve is the "
    "mean of all complete ones. LIM is 1 where a sample's curve equals the average, and falls with the squared "
    "distance from it, 0 being as far as always right: it keeps samples that the model learns when it learns "
    "everything else (arXiv 2502.11886)."
)


def group_columns(
    selection: Selection, problems: Mapping[str, Mapping[str, Any]] | None, facts: Facts | None
) -> dict[str, list[str]]:
    """Name of a grouping -> the group of each sample [N]: columns of the problems with few values, and lengths."""
    found: dict[str, list[str]] = {}
    rows = [problems.get(sample_id, {}) for sample_id in selection.sample_ids] if problems is not None else []
    for name in GROUPS:
        values = ["none" if row.get(name) is None else str(row[name]) for row in rows]
        if 1 < len(set(values)) <= MOST_GROUPS:
            found[name] = values
    if facts is not None:
        tokens = dict(zip(facts.sample_ids, facts.tokens, strict=True))
        lengths = np.array([tokens.get(sample_id, np.nan) for sample_id in selection.sample_ids])
        found |= _quartiles("mean completion length (tokens)", lengths)
    if rows and all("problem" in row for row in rows):
        lengths = np.array([len(str(row["problem"])) for row in rows], dtype=float)
        found |= _quartiles("length of the problem (characters)", lengths)
    return found


def group_rows(groups: Sequence[str], kept: np.ndarray, name: str) -> list[list[str]]:
    """Heading row first: kept and all samples of each group, the share kept, the group's share of the subset."""
    order, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    total, inside = np.bincount(index, minlength=len(order)), np.bincount(index[kept], minlength=len(order))
    rows = [[name, "kept", "samples", "share kept", "share of the subset", "share of all"]]
    for group, part, whole in zip(order, inside, total, strict=True):
        rows.append(
            [
                str(group),
                f"{part:,}",
                f"{whole:,}",
                f"{part / whole:.0%}",
                f"{part / max(kept.sum(), 1):.0%}",
                f"{whole / len(kept):.0%}",
            ]
        )
    return rows


def health_rows(facts: Facts, selection: Selection) -> list[list[str]]:
    """Heading row first: verdicts of all completions, then suspect and never-solved samples, kept and dropped."""
    rows = [["what", "number", "of", "share"]]
    rows += [
        [f"verdict: {reason}", f"{n:,}", f"{facts.rows:,}", f"{n / facts.rows:.1%}"]
        for reason, n in facts.reasons.items()
    ]
    place = {sample_id: number for number, sample_id in enumerate(facts.sample_ids)}
    known = np.array([sample_id in place for sample_id in selection.sample_ids])
    at = np.array([place.get(sample_id, 0) for sample_id in selection.sample_ids])
    for title, flags in (("mostly ungradable", facts.suspect()), ("never right", facts.correct == 0)):
        marked = flags[at] & known
        for side, members in (("kept", selection.kept), ("dropped", ~selection.kept)):
            count = int(members.sum())
            n = int((marked & members).sum())
            rows.append([f"samples {title}, {side}", f"{n:,}", f"{count:,}", f"{n / count:.1%}" if count else "-"])
    return rows


def compared(selection: Selection, seed: int) -> dict[str, set[str]]:
    """What other methods would keep of the same curves, at the same size."""
    found = {selection.method: set(selection.ids)}
    count = len(found[selection.method])
    for name in ("lim", "linear", "pass_rate", "variance", "p(1-p)", "random"):
        if name in found:
            continue
        try:
            # Middling first success is what the pass-rate band ranks best.
            values = selection.curves
            if name == "pass_rate":
                values = 0.5 - np.abs(values[:, :1] - 0.5)
            found[name] = set(select_samples(name, selection.sample_ids, values, count=count, seed=seed).ids)
        except ValueError:
            # Fewer samples have a score by this method than were kept; it is left out of the comparison.
            continue
    return found


def never_right_is_kept(selection: Selection) -> str:
    """A warning, or nothing: where the average stays low, a curve of zeros is close to it, and LIM keeps it."""
    if selection.method != "lim" or selection.low is None or selection.average is None:
        return ""
    room = float(((1 - selection.average) ** 2).sum())
    zeros = 1 - float((selection.average**2).sum()) / room if room > 0 else float("nan")
    if not zeros >= selection.low:
        return ""
    return (
        f"The average curve ends at {selection.average[-1]:.2f} and stays so low that a sample never answered right "
        f"scores {zeros:.2f} and is kept: this run is too short, or too hard, for LIM to tell learning from failing. "
        "Record more epochs, or raise the threshold above that score."
    )


def sections(
    selection: Selection,
    *,
    value: str,
    source: str,
    facts: Facts | None = None,
    problems: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> list[Section]:
    """The report's sections.

    Args:
        selection: what was kept.
        value: what the curves measure, in words.
        source: where they come from, in words.
        facts: of the history; None for a bare table of curves.
        problems: id -> columns, for groups and statements.
        seed: of the methods compared with.
    """
    n, kept = len(selection.sample_ids), int(selection.kept.sum())
    unscored, gaps = int(np.isnan(selection.scores).sum()), int(selection.incomplete.sum())
    summary = [
        f"{kept:,} of {n:,} samples are kept ({kept / n:.1%}). Rule: {selection.rule}.",
        f"Curves over {selection.curves.shape[1]} epochs from {source}. {gaps:,} samples lack an epoch; "
        f"{unscored:,} have no score and are dropped.",
        GLOSSARY,
    ]
    if warning := never_right_is_kept(selection):
        summary.insert(1, f"Warning. {warning}")
    out: list[Section] = [{"title": "What was kept", "text": summary}]
    if facts is not None:
        out[0]["note"] = "A method that needs a recorded run has already spent its rollouts: " + (
            f"{facts.rows:,} completions here. Count them when comparing with methods that need none."
        )
        out.append(
            {
                "title": "Grader health",
                "text": "A gold that cannot be read looks like a sample that is never learned. Where many are "
                "ungradable, a selection picks for the grader: mend the golds (plumbline check) before trusting it.",
                "table": health_rows(facts, selection),
            }
        )
    if selection.curves.shape[1] > 1:
        out.append(
            {
                "title": "Learning curves",
                "text": f"The average over complete samples, with three samples of the highest and three of the lowest "
                f"{selection.label}.",
                "figures": [
                    figures.average_learning_curve(
                        selection.curves, selection.sample_ids, selection.scores, value=value
                    )
                ],
            }
        )
    out.append(
        {"title": "Scores", "figures": [figures.score_histogram(selection.scores, selection.low, name=selection.label)]}
    )
    for name, groups in group_columns(selection, problems, facts).items():
        out.append(
            {
                "title": f"By {name}",
                "table": group_rows(groups, selection.kept, name),
                "figures": [figures.kept_by_group(groups, selection.kept, name=name)],
            }
        )
    others = compared(selection, seed)
    if len(others) > 1:
        out.append(
            {
                "title": "Overlap with other methods",
                "text": f"What each method keeps of the same curves when asked for {kept:,} samples: the share of a "
                f"row's subset that the column's method keeps too. Chance is {kept / n:.0%}.",
                "figures": [figures.overlap(others)],
            }
        )
    out.append(
        {
            "title": "Samples",
            "table": sample_rows(selection, problems),
            "note": "Highest and lowest scores; all are in scores.parquet.",
        }
    )
    return out


def sample_rows(selection: Selection, problems: Mapping[str, Mapping[str, Any]] | None) -> list[list[str]]:
    """Heading row first: the highest and the lowest scored samples."""
    rows = [["id", "score", "kept", "first", "last", "problem"]]
    known = np.flatnonzero(~np.isnan(selection.scores))
    order = known[np.argsort(-selection.scores[known], kind="stable")]
    shown = (
        order if len(order) <= 2 * SHOWN_SAMPLES else np.concatenate([order[:SHOWN_SAMPLES], order[-SHOWN_SAMPLES:]])
    )
    for place in shown:
        sample_id = selection.sample_ids[place]
        text = str((problems or {}).get(sample_id, {}).get("problem", "-"))
        ends = [f"{reward:.2f}" if not np.isnan(reward) else "-" for reward in selection.curves[place, [0, -1]]]
        kept = "yes" if selection.kept[place] else "no"
        rows.append(
            [sample_id, f"{selection.scores[place]:.2f}", kept, *ends, text if len(text) <= 160 else text[:159] + "…"]
        )
    return rows


def _quartiles(name: str, lengths: np.ndarray) -> dict[str, list[str]]:
    """A grouping by quartiles, or nothing where lengths are unknown or all alike."""
    known = lengths[~np.isnan(lengths)]
    if len(known) < 8 or np.ptp(known) == 0:
        return {}
    edges = np.unique(np.percentile(known, [25, 50, 75]))
    labels = [f"1: up to {edges[0]:,.0f}"]
    labels += [f"{i + 2}: {a:,.0f} to {b:,.0f}" for i, (a, b) in enumerate(pairwise(edges))]
    labels.append(f"{len(edges) + 1}: over {edges[-1]:,.0f}")
    return {name: ["unknown" if np.isnan(v) else labels[int(np.searchsorted(edges, v, side="left"))] for v in lengths]}
