"""The check's report: one self-contained HTML page to be read in two minutes, and reading a run's completions."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plumbline.rewards.checking.checker import RewardChecker, interval

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{border:1px solid #ccc;padding:.25em .7em;text-align:left;vertical-align:top}"  # noqa: E501
    "pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;max-height:14em;overflow:auto}"
    ".ok{color:#17702d}.warn{color:#946200}.stop{color:#b00020}"
)
_VERDICT = {
    "ok": "Rewards look sound.",
    "warn": "Look before you trust these rewards.",
    "stop": "Do not train on these rewards.",
}


def read_completions(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Completions of RUN/completions/*.jsonl, one step at a time, in order of steps.

    Raises:
        FileNotFoundError: the run has no completions.
        ValueError: a line is not a JSON object with a step.
    """
    files = sorted((run / "completions").glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{run}: no completions/*.jsonl in it; is this the output folder of a training run?")
    steps: dict[int, list[dict[str, Any]]] = {}
    for file in files:
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


def _table(head: list[str], rows: list[list[Any]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + f"</tr>{cells}</table>"


def _share(hits: int, n: int) -> str:
    if not n:
        return "none re-graded"
    low, high = interval(hits, n)
    return f"{hits} of {n}: {hits / n:.1%} ({low:.1%} to {high:.1%})"


def render(checker: RewardChecker, title: str) -> str:
    """The whole page. Shares come with their 95% interval (Wilson)."""
    decision, reasons = checker.decide()
    total, table = checker.totals, checker.table
    n, regraded = total["completions"], total["regraded"]
    parts = [
        f"<h1>{html.escape(title)}</h1><p class={decision}><b>{decision.upper()}.</b> {_VERDICT[decision]}</p>",
        "<ul>" + "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons) + "</ul>" if reasons else "",
        f"<p>{n} completions in {len(checker.steps)} steps; {regraded} graded again by math-verify.</p>",
        "<h2>Two checkers</h2>",
        _table(
            ["", "second: right", "second: wrong"],
            [
                ["rewarded", table[True, True], table[True, False]],
                ["not rewarded", table[False, True], table[False, False]],
            ],
        ),
        _table(
            ["what", "share (95% interval)"],
            [
                ["rewarded, second checker says wrong", _share(total["false_reward"], regraded)],
                ["not rewarded, second checker says right", _share(total["missed_reward"], regraded)],
                *[
                    [name.removeprefix("fault_").replace("_", " "), _share(hits, n)]
                    for name, hits in sorted(total.items())
                    if name.startswith("fault_")
                ],
                *[
                    [name.removeprefix("detector_").replace("_", " "), _share(hits, n)]
                    for name, hits in sorted(total.items())
                    if name.startswith("detector_")
                ],
            ],
        ),
    ]
    suspects = checker.suspected_golds()
    if suspects:
        rows = [[sample, gold, answer, votes] for sample, (gold, answer, votes) in sorted(suspects.items())]
        parts += ["<h2>Golds that look wrong</h2>", _table(["sample", "gold", "completions say", "votes"], rows[:50])]
    if checker.quarantined:
        parts += [
            f"<h2>Quarantined: {len(checker.quarantined)}</h2>",
            _table(["sample", "why"], [[k, v] for k, v in sorted(checker.quarantined.items())][:50]),
        ]
    if checker.cases:
        parts.append("<h2>Texts that caused it</h2>")
        shown: dict[str, int] = {}
        for case in checker.cases:
            shown[case.kind] = shown.get(case.kind, 0) + 1
            if shown[case.kind] <= 3:
                head = f"{case.kind.replace('_', ' ')}: step {case.step}, sample {case.sample_id}, answer {case.answer!r}, gold {case.gold!r}, reward {case.reward:g}"  # noqa: E501
                parts.append(f"<h3>{html.escape(head)}</h3><pre>{html.escape(case.response)}</pre>")
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>" + "".join(
        parts
    )


def check_run(run: Path, out: Path, checker: RewardChecker) -> dict[str, Any]:
    """Check a finished (or running) run; write check.json, check_cases.jsonl and check.html into `out`; return the summary."""  # noqa: E501
    for step, rows in read_completions(run):
        checker.check(step, rows)
    out.mkdir(parents=True, exist_ok=True)
    summary = checker.summary()
    (out / "check.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    with (out / "check_cases.jsonl").open("w", encoding="utf-8") as file:
        for case in checker.cases:
            file.write(json.dumps(case.__dict__, ensure_ascii=False) + "\n")
    (out / "check.html").write_text(render(checker, f"Reward check of {run.name}"), encoding="utf-8")
    return summary
