"""The loss-to-loss report: tables, figures, and the answer in words with its evidence and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from plumbline.selection.figures import FONT, HIGH, LOW, NEUTRAL, label_axes, new_figure
from plumbline.selection.loss_to_loss import OneLine
from plumbline.selection.report import Section
from plumbline.selection.scaling_analysis import Columns, Effect, Family

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#9aa3ad")
MARKS = "osD^vPX*"
# Below this, whether two groups differ is no finding (Bonferroni over the pairs comes on top).
LEVEL = 0.05


@dataclass
class Analysis:
    """Everything one report says.

    Attributes:
        columns, families, left_out: as scaling_analysis.families.
        comparisons: (name, name, test) of pairs of families.
        effects: of the factors, largest first.
        predictions: (family, x, predicted, measured) of held-out runs.
        rows, dropped: rows used, and those left out as incomplete.
    """

    columns: Columns
    families: list[Family]
    left_out: list[str]
    comparisons: list[tuple[str, str, OneLine]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    predictions: list[tuple[str, float, float, float]] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0

    @property
    def same_axes(self) -> bool:
        """Whether y means the same for every family; between train-to-train families it does not."""
        return self.columns.reference is None


def answer(analysis: Analysis) -> list[str]:
    """What to change, with the evidence and its limits, a paragraph each."""
    out = [_what_moves_the_line(analysis), _which_group(analysis)]
    straight = [f.name for f in analysis.families if f.straight[2]]
    if straight:
        out.append(
            f"A straight line y = a + b x fits as well as the power law for {_list(straight)}: over the losses seen, "
            "the points do not tell kappa from 1."
        )
    doubtful = [f.name for f in analysis.families if f.warnings]
    if doubtful:
        out.append(f"Not to be trusted beyond the points themselves: {_list(doubtful)}; the reasons are listed below.")
    if analysis.predictions:
        out.append(_missed(analysis))
    out.append(
        "Limits: these are correlations between runs that someone chose to make, within the range of losses seen. "
        "A group that differs in more than one way is credited with all of it, and a loss a token compares only models "
        "of one tokenizer."
    )
    return [paragraph for paragraph in out if paragraph]


def sections(analysis: Analysis) -> list[Section]:
    """The report's sections."""
    columns = analysis.columns
    dropped = f" {analysis.dropped:,} incomplete rows were left out." if analysis.dropped else ""
    found: list[Section] = [
        {"title": "Answer", "text": answer(analysis)},
        {
            "title": "Fits",
            "text": "L_y = K (L_x - E_x)^kappa + E_y, with 95% bootstrap intervals; n pairs; R2 is of the loss itself.",
            "table": fit_rows(analysis.families),
            "figures": [lines_figure(analysis)],
            "note": f"x is {columns.x!r}, y is {columns.y!r}, {analysis.rows:,} rows.{dropped} "
            f"E comes from: {_list(sorted({f.offsets for f in analysis.families}))}.",
        },
    ]
    complaints = [[f.name, warning] for f in analysis.families for warning in f.warnings]
    complaints += [["left out", reason] for reason in analysis.left_out]
    if complaints:
        found.append({"title": "What does not hold", "table": [["group", "why"], *complaints]})
    if analysis.effects:
        found.append(
            {
                "title": "What moves the line",
                "text": "Share of the scatter about one common line that goes with a factor, adjusted for its levels.",
                "table": effect_rows(analysis.effects),
                "figures": [effects_figure(analysis.effects)],
            }
        )
    if analysis.comparisons:
        found.append(
            {
                "title": "One line or two",
                "text": "F test of two lines against one, and the mean gap in loss at equal x (second minus first) "
                "over the x that both cover.",
                "table": comparison_rows(analysis.comparisons),
            }
        )
    if analysis.predictions:
        found.append(
            {"title": "Held-out runs", "text": _missed(analysis), "table": prediction_rows(analysis.predictions)}
        )
    return found


def fit_rows(families: Sequence[Family]) -> list[list[str]]:
    """Heading row first."""
    rows = [["group", "n", "K", "kappa", "E_x", "E_y", "R2", "straight line as good"]]
    for family in families:
        cells = [str(family.intervals[name]) for name in ("K", "kappa", "e_x", "e_y")]
        r2 = family.intervals["r2"]
        rows.append(
            [
                family.name,
                f"{family.fit.n}",
                *cells,
                f"{r2.value:.6f} [{r2.low:.4f}, {r2.high:.4f}]",
                f"yes: {family.straight[0]:.3g} + {family.straight[1]:.3g} x" if family.straight[2] else "no",
            ]
        )
    return rows


def comparison_rows(comparisons: Sequence[tuple[str, str, OneLine]]) -> list[list[str]]:
    """Heading row first."""
    rows = [["first", "second", "n", "p", "gap [95%]", "verdict"]]
    for a, b, test in comparisons:
        verdict = "two lines" if test.p_value < LEVEL / len(comparisons) else "one line will do"
        gap = (
            "no x in common"
            if test.shared is None
            else f"{test.gap.value:+.4f} [{test.gap.low:+.4f}, {test.gap.high:+.4f}]"
        )
        rows.append([a, b, f"{test.n[0]}, {test.n[1]}", f"{test.p_value:.2g}", gap, verdict])
    return rows


def effect_rows(effects: Sequence[Effect]) -> list[list[str]]:
    """Heading row first."""
    rows = [["factor", "levels", "n", "share explained [95%]", "p", "cannot be told apart from"]]
    for effect in effects:
        share = f"{effect.share.value:.0%} [{effect.share.low:.0%}, {effect.share.high:.0%}]"
        mixed = ", ".join(effect.determined_by) or "-"
        rows.append([effect.factor, f"{effect.levels}", f"{effect.n}", share, f"{effect.p_value:.2g}", mixed])
    return rows


def prediction_rows(predictions: Sequence[tuple[str, float, float, float]]) -> list[list[str]]:
    """Heading row first."""
    rows = [["group", "x", "predicted y", "measured y", "missed by", "relative"]]
    for name, x, predicted, measured in predictions:
        missed = predicted - measured
        rows.append(
            [name, f"{x:.4f}", f"{predicted:.4f}", f"{measured:.4f}", f"{missed:+.4f}", f"{missed / measured:+.2%}"]
        )
    return rows


def lines_figure(analysis: Analysis) -> Figure:
    """Points and fitted curves of every family."""
    figure, axes = new_figure(height=5.0)
    for place, family in enumerate(analysis.families):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        axes.scatter(family.x, family.y, s=18, color=colour, marker=mark, alpha=0.6, linewidths=0)
        grid = np.linspace(family.x.min(), family.x.max(), 200)
        label = f"{family.name} (n = {family.fit.n}, kappa {family.fit.kappa:.2f})"
        axes.plot(grid, family.fit.predict(grid), color=colour, linewidth=1.8, label=label)
    if analysis.predictions:
        _, x, _, measured = zip(*analysis.predictions, strict=True)
        axes.scatter(x, measured, s=70, marker="*", color="#000000", zorder=5, label="held-out run, measured")
    side = f" of {analysis.columns.reference}" if analysis.columns.reference else ""
    label_axes(axes, f"{analysis.columns.x}{side} (loss)", f"{analysis.columns.y} (loss)")
    figure.legend(
        loc="outside lower center", fontsize=FONT - 2, frameon=False, ncols=1 if len(analysis.families) < 6 else 2
    )
    return figure


def effects_figure(effects: Sequence[Effect]) -> Figure:
    """Bars with intervals, one a factor."""
    figure, axes = new_figure(height=1.4 + 0.45 * len(effects))
    values = np.array([100 * effect.share.value for effect in effects])
    spread = np.array([[100 * (e.share.value - e.share.low), 100 * (e.share.high - e.share.value)] for e in effects]).T
    colours = [NEUTRAL if effect.p_value > LEVEL else HIGH for effect in effects]
    axes.barh(range(len(effects)), values, xerr=np.clip(spread, 0, None), capsize=4, color=colours, ecolor=LOW)
    axes.set_yticks(range(len(effects)), [effect.factor for effect in effects])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    label_axes(axes, "scatter explained (%), 95% interval", "factor")
    return figure


def _what_moves_the_line(analysis: Analysis) -> str:
    if not analysis.effects:
        return ""
    strong = [effect for effect in analysis.effects if effect.p_value < LEVEL / len(analysis.effects)]
    listed = "; ".join(
        f"{e.factor} {e.share.value:.0%} [{e.share.low:.0%}, {e.share.high:.0%}] (n = {e.n}, {e.levels} levels)"
        for e in analysis.effects
    )
    if not strong:
        return f"No factor moves the line beyond chance. Share of the scatter explained: {listed}."
    first = strong[0]
    text = f"Change {first.factor} first: it explains most of the scatter about one common line. Shares: {listed}."
    if first.determined_by:
        text += f" In every row {_list(first.determined_by)} fixes {first.factor}, so it may be the cause as well."
    rival = next((e for e in strong[1:] if e.share.high >= first.share.low), None)
    if rival is not None:
        text += f" The intervals of {first.factor} and {rival.factor} overlap: their order is not settled."
    return text


def _which_group(analysis: Analysis) -> str:
    families = analysis.families
    if len(families) < 2:
        one = families[0]
        return (
            f"{one.name}: K = {one.intervals['K']}, kappa = {one.intervals['kappa']}, R2 = {one.fit.r2:.4f}, "
            f"n = {one.fit.n}. One group shows how the losses go together, not what to change: name a group column."
        )
    if not analysis.same_axes:
        steep = ", ".join(f"{f.name} {f.intervals['kappa']}" for f in families)
        return (
            f"From the loss on {analysis.columns.reference}, the loss of the same training on another set follows with "
            f"kappa (1 = in proportion): {steep}. Each set is measured on its own validation text, so a lower y does "
            "not mean better data; compare a common test loss for that."
        )
    low, high = max(f.x.min() for f in families), min(f.x.max() for f in families)
    if low >= high:
        return "The groups share no range of x, so none can be called better at equal x."
    x = 0.5 * (low + high)
    order = sorted(families, key=lambda family: float(family.fit.predict(x)))
    best, worst = order[0], order[-1]
    column = analysis.columns.group or "group"
    text = (
        f"At {analysis.columns.x} = {x:.3g}, {column} {best.name} gives the lowest {analysis.columns.y} "
        f"({float(best.fit.predict(x)):.4g}) and {worst.name} the highest ({float(worst.fit.predict(x)):.4g})."
    )
    second = order[1]
    for a, b, test in analysis.comparisons:
        if {a, b} == {best.name, second.name} and test.shared is not None:
            sign = 1 if a == best.name else -1
            gap = sorted(sign * v for v in (test.gap.low, test.gap.high))
            clear = test.p_value < LEVEL / len(analysis.comparisons) and gap[0] > 0
            text += (
                f" The next, {second.name}, lies higher by {sign * test.gap.value:.4f} [{gap[0]:.4f}, {gap[1]:.4f}] "
                f"(n = {test.n[0]} and {test.n[1]}): "
                + ("a difference." if clear else "not a difference this table can show.")
            )
    return text


def _missed(analysis: Analysis) -> str:
    missed = np.array([predicted - measured for _, _, predicted, measured in analysis.predictions])
    return (
        f"Held-out runs: {len(missed)} predicted from x, missed by {np.abs(missed).mean():.4f} on average "
        f"(worst {missed[np.argmax(np.abs(missed))]:+.4f})."
    )


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
