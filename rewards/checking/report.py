"""The check's report: one self-contained HTML page to be read in two minutes, and reading a run's completions."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plumbline.rewards.checking.checker import RewardChecker, interval

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{border:1px solid #ccc;padding:.25em .7em;text-align:left;vertical-align:top}"
    "td,h3,li{overflow-wrap:anywhere}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.6em;max-height:14em;overflow:auto}"
    ".ok{color:#17702d}.warn{color:#946200}.stop{color:#b00020}.verdict{font-size:1.3em}h3{font-size:1em;margin:1.2em 0 .3em}"
    "svg{width:100%;max-width:44em;height:auto;display:block}svg text{font:14px system-ui,sans-serif;fill:#555}"
    "@media(max-width:30em){body{margin:1em auto;font-size:14px}td,th{padding:.2em .4em}}"
)
_VERDICT = {
    "ok": "Rewards look sound.",
    "warn": "Look before you trust these rewards.",
    "stop": "Do not train on these rewards.",
}
_NAMES = {
    "fault_error": "grading failed",
    "fault_timeout": "grading ran out of time",
    "fault_bad_gold": "gold cannot be read",
    "second_error": "second checker failed",
    "second_timeout": "second checker ran out of time",
    "detector_many_boxes": "three boxes or more",
    "detector_boxed_question": "the question in the box",
    "detector_repetition": "says the same over and over",
    "detector_no_reasoning": "an answer without reasoning",
    "false_reward": "rewarded, second checker says wrong",
    "missed_reward": "not rewarded, second checker says right",
}
SHOWN_CASES = 3


def read_completions(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Completions of RUN/completions/*.jsonl, one step at a time, in the order of the files' numbers.

    Raises:
        FileNotFoundError: the run has no completions.
        ValueError: a line is not a JSON object with a step.
    """
    files = sorted((run / "completions").glob("*.jsonl"), key=_natural)
    if not files:
        inner = sorted(str(path.parent) for path in run.glob("*/completions") if any(path.glob("*.jsonl")))
        hint = f"check one of {', '.join(inner)}" if inner else "is this the output folder of a training run?"
        raise FileNotFoundError(f"{run}: no completions/*.jsonl in it; {hint}")
    for file in files:
        steps: dict[int, list[dict[str, Any]]] = {}
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    step = int(row["step"])
                except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                    raise ValueError(f"{file}, line {number}: not a JSON object with a step") from None
                steps.setdefault(step, []).append(row)
        yield from sorted(steps.items())


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", path.name)]


def _table(head: list[str], rows: list[list[Any]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + f"</tr>{cells}</table>"


def _share(hits: int, n: int) -> str:
    if not n:
        return "none re-graded"
    low, high = interval(hits, n)
    return f"{hits} of {n}: {hits / n:.1%} ({low:.1%} to {high:.1%})"


def _chart(series: dict[str, list[float]]) -> str:
    """Two lines over the steps: the share rewarded, and the share that the second checker holds right."""
    n = len(series.get("rewarded", []))
    if n < 2:
        return ""
    width, height, left, foot = 600, 130, 34, 18
    parts = [f'<svg viewBox="0 0 {width} {height + foot}" role="img" aria-label="Shares over the steps">']
    for share in (0.0, 0.5, 1.0):
        y = height - 6 - share * (height - 16)
        parts.append(
            f'<line x1={left} x2={width} y1={y:.1f} y2={y:.1f} stroke="#ddd"/><text x=0 y={y + 4:.1f}>{share:.0%}</text>'
        )
    for name, colour in (("rewarded", "#1f5fa8"), ("second", "#c05a00")):
        runs: list[list[str]] = [[]]
        for number, value in enumerate(series[name]):
            if value != value:  # nothing was graded again in this step
                runs.append([])
                continue
            x = left + number * (width - left - 4) / (n - 1)
            runs[-1].append(f"{x:.1f},{height - 6 - value * (height - 16):.1f}")
        for points in runs:
            if points:
                parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(points)}"/>')
    parts.append(
        f'<text x={left} y={height + 13}><tspan style="fill:#1f5fa8">— rewarded</tspan> '
        f'<tspan dx="12" style="fill:#c05a00">— right to the second checker (of those graded again)</tspan></text></svg>'
    )
    return "".join(parts)


def render(checker: RewardChecker, title: str) -> str:
    """The whole page. Shares come with their 95% interval (Wilson)."""
    decision, reasons = checker.decide()
    total = checker.totals
    n, regraded = total["completions"], total["regraded"]
    rows = [[_NAMES[name], _share(total[name], regraded)] for name in ("false_reward", "missed_reward")]
    rows += [
        [_NAMES.get(k, k), _share(v, n)]
        for k, v in sorted(total.items())
        if k.startswith(("fault_", "second_e", "second_t", "detector_"))
    ]
    first = next((step for step, seen in checker.steps if seen == "stop"), None)
    parts = [
        f"<h1>{html.escape(title)}</h1><p class='verdict {decision}'><b>{decision.upper()}.</b> {_VERDICT[decision]}</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons) + "</ul>" if reasons else "",
        f"<p>{n:,} completions in {len(checker.steps)} steps; {regraded:,} graded again by math-verify."
        + (f" A stop threshold was first passed at step {first}." if first is not None else "")
        + "</p>",
        "<h2>Two checkers</h2>",
        _table(
            ["", "second: right", "second: wrong"],
            [
                [label, *(total[f"reward_{side}_second_{other}"] for other in ("right", "wrong"))]
                for label, side in (("rewarded", "right"), ("not rewarded", "wrong"))
            ],
        ),
        _chart(checker.series),
        "<h2>Signs of trouble</h2>",
        _table(["what", "share (95% interval)"], rows),
    ]
    suspects = checker.suspected_golds()
    if suspects:
        table = [[sample, gold, answer, votes] for sample, (gold, answer, votes) in sorted(suspects.items())]
        parts += [
            "<h2>Golds that look wrong</h2>",
            _table(["sample", "gold", "completions say", "votes"], table[:50]),
            _more(table),
        ]
    if checker.cases:
        parts.append("<h2>Texts that caused it</h2>")
        shown: dict[str, int] = {}
        for case in sorted(checker.cases, key=lambda case: case.kind not in ("false_reward", "missed_reward")):
            shown[case.kind] = shown.get(case.kind, 0) + 1
            if shown[case.kind] <= SHOWN_CASES:
                what = _NAMES.get(
                    case.kind, _NAMES.get("detector_" + case.kind, _NAMES.get("fault_" + case.kind, case.kind))
                )
                head = f"{what}: step {case.step}, sample {case.sample_id}, answer {case.answer!r}, gold {case.gold!r}, reward {case.reward:g}"
                parts.append(f"<h3>{html.escape(head)}</h3><pre>{html.escape(case.response)}</pre>")
    if checker.quarantined:
        parts.append(f"<h2>Quarantined: {len(checker.quarantined)}</h2><p>Listed in quarantine.txt.</p><ul>")
        for why in sorted(set(checker.quarantined.values())):
            samples = sorted(sample for sample, reason in checker.quarantined.items() if reason == why)
            named = ", ".join(samples[:20]) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
            parts.append(f"<li>{html.escape(f'{why} ({len(samples)}): {named}')}</li>")
        parts.append("</ul>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>" + "".join(parts)
    )


def _more(table: list[list[Any]]) -> str:
    return f"<p>and {len(table) - 50} more, in check.json</p>" if len(table) > 50 else ""


def write_report(checker: RewardChecker, out: Path, name: str) -> dict[str, Any]:
    """Write check.html, check.json, check_cases.jsonl and quarantine.txt into `out`; return the summary."""
    out.mkdir(parents=True, exist_ok=True)
    summary = checker.summary()
    cases = "".join(json.dumps(case.__dict__, ensure_ascii=False) + "\n" for case in checker.cases)
    for file, text in (
        ("check.json", json.dumps(summary, indent=2, ensure_ascii=False)),
        ("check_cases.jsonl", cases),
        ("quarantine.txt", "".join(sample + "\n" for sample in sorted(checker.quarantined))),
        ("check.html", render(checker, f"Reward check of {name}")),
    ):
        # A model's text may hold lone surrogates, which UTF-8 has no bytes for.
        (out / file).write_bytes(text.encode("utf-8", "backslashreplace"))
    return summary


def check_run(run: Path, out: Path, checker: RewardChecker) -> dict[str, Any]:
    """Check a finished (or running) run and write its report into `out`; return the summary."""
    for step, rows in read_completions(run):
        checker.check(step, rows)
    return write_report(checker, out, run.resolve().name)
