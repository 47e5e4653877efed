"""The reward checker: fed with completions step by step, it re-grades a share of them with the second checker, counts
disagreements and detector hits, quarantines samples and says whether to warn or stop."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, Literal

from plumbline.rewards.checking.detectors import DETECTORS, diverging, length_drift
from plumbline.rewards.extraction import last_boxed
from plumbline.rewards.verifier import unbox
from plumbline.rewards.workers import Grader

Decision = Literal["ok", "warn", "stop"]
GRADER_FAULTS = ("error", "timeout", "bad_gold")


@dataclass(frozen=True)
class Thresholds:
    """Shares of completions at which a run is warned about or stopped.

    Attributes:
        warn_false_reward, stop_false_reward: rewarded completions that the second checker holds wrong, of those re-graded.
        warn_disagreement, stop_disagreement: all disagreements, of those re-graded.
        warn_faults, stop_faults: errors, timeouts and unreadable golds, of all.
        warn_detector: hits of any one detector among all completions.
        minimum: completions re-graded before a share of them counts.
        suspect_gold: answers of one sample, all the same, that the gold calls wrong, before the gold is suspected.
    """  # noqa: E501

    warn_false_reward: float = 0.02
    stop_false_reward: float = 0.20
    warn_disagreement: float = 0.05
    stop_disagreement: float = 0.30
    warn_faults: float = 0.01
    stop_faults: float = 0.20
    warn_detector: float = 0.20
    minimum: int = 20
    suspect_gold: int = 4


@dataclass
class Case:
    """One completion worth a look, with the text that caused it."""

    step: int
    sample_id: str
    rollout: int
    kind: str
    answer: str
    gold: str
    reward: float
    correct: bool
    second: bool | None
    response: str


@dataclass
class StepReport:
    """What one step's check found: counters for telemetry, the decision and its reasons."""

    step: int
    counters: dict[str, float]
    decision: Decision
    reasons: list[str]
    quarantined: list[str] = field(default_factory=list)


class RewardChecker:
    """Checks rewards alongside training, or over a finished run.

    Args:
        share: of completions that the second checker re-grades, chosen by a hash of (step, sample, rollout).
        thresholds: when to warn and stop.
        processes, timeout: of the second checker's killable children.
        keep: cases kept with their text.
        window: steps over which drifts are judged.
    """

    def __init__(
        self,
        share: float = 0.1,
        thresholds: Thresholds | None = None,
        *,
        processes: int = 1,
        timeout: float = 2.0,
        keep: int = 200,
        window: int = 20,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share ({share}) must be above 0 and at most 1")
        self.share, self.thresholds, self.keep, self.window = share, thresholds or Thresholds(), keep, window
        self.grader = Grader(processes, timeout, second=True)
        self.totals: Counter[str] = Counter()
        self.table: Counter[tuple[bool, bool]] = Counter()
        self.cases: list[Case] = []
        self.steps: list[StepReport] = []
        self.series: dict[str, list[float]] = defaultdict(list)
        self.wrong_answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.golds: dict[str, str] = {}
        self.rewarded: Counter[str] = Counter()
        self.faulty: Counter[str] = Counter()
        self.disputed: Counter[str] = Counter()
        self.quarantined: dict[str, str] = {}

    def close(self) -> None:
        """End the second checker's children."""
        self.grader.close()

    def __enter__(self) -> RewardChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, step: int, rows: Iterable[Mapping[str, Any]]) -> StepReport:
        """Check one step's completions.

        Args:
            step: training step.
            rows: mappings with sample_id, rollout, problem (or prompt), response, gold, reward, correct, reason, tokens.

        Raises:
            ValueError: a row lacks one of these fields.
        """  # noqa: E501
        rows = [_normal(row) for row in rows]
        count: Counter[str] = Counter(completions=len(rows))
        for row in rows:
            self.golds[row["sample_id"]] = row["gold"]
            self.rewarded[row["sample_id"]] += bool(row["correct"])
            if row["reason"] in GRADER_FAULTS:
                count[f"fault_{row['reason']}"] += 1
                self.faulty[row["sample_id"]] += 1
                self._case(step, row, row["reason"], None)
            for name, detector in DETECTORS.items():
                if detector(row["problem"], row["response"]):
                    count[f"detector_{name}"] += 1
                    self._case(step, row, name, None)
            box = last_boxed(row["response"])
            if not row["correct"] and box is not None and row["reason"] == "wrong":
                self.wrong_answers[row["sample_id"]]["".join(box.split())] += 1
        chosen = [row for row in rows if row["reason"] not in GRADER_FAULTS and self._chosen(step, row)]
        answered = [(row, last_boxed(row["response"])) for row in chosen]
        verdicts = iter(
            self.grader.compare_many(
                [(box, unbox(row["gold"])) for row, box in answered if box is not None and box.strip()]
            )
        )
        agreed = 0
        for row, box in answered:
            second = False
            if box is not None and box.strip():
                verdict = next(verdicts)
                if verdict.reason not in ("correct", "wrong"):
                    count[f"second_{verdict.reason}"] += 1
                    continue
                second = verdict.correct
            count["regraded"] += 1
            agreed += second
            self.table[bool(row["correct"]), second] += 1
            if bool(row["correct"]) != second:
                kind = "false_reward" if row["correct"] else "missed_reward"
                count[kind] += 1
                self.disputed[row["sample_id"]] += 1
                self._case(step, row, kind, second)
        self.totals.update(count)
        if rows:
            self.series["rewarded"].append(sum(bool(r["correct"]) for r in rows) / len(rows))
            self.series["length"].append(sum(float(r["tokens"]) for r in rows) / len(rows))
        if count["regraded"]:
            self.series["second"].append(agreed / count["regraded"])
        fresh = self._quarantine()
        decision, reasons = self.decide()
        counters = {f"check/{name}": float(value) for name, value in sorted(count.items())}
        counters["check/quarantined"] = float(len(self.quarantined))
        report = StepReport(step, counters, decision, reasons, fresh)
        self.steps.append(report)
        return report

    def decide(self) -> tuple[Decision, list[str]]:
        """The decision over everything seen so far, with a sentence for each threshold passed."""
        t, total = self.thresholds, self.totals
        warn: list[str] = []
        stop: list[str] = []

        def share(label: str, hits: int, of: int, warn_at: float, stop_at: float) -> None:
            if of and hits / of >= warn_at:
                low, high = interval(hits, of)
                sentence = f"{label}: {hits} of {of} ({hits / of:.1%}, 95% interval {low:.1%} to {high:.1%})"
                (stop if hits / of >= stop_at else warn).append(sentence)

        if total["regraded"] >= t.minimum:
            regraded = total["regraded"]
            share(
                "rewarded answers that the second checker holds wrong",
                total["false_reward"],
                regraded,
                t.warn_false_reward,
                t.stop_false_reward,
            )
            disputes = total["false_reward"] + total["missed_reward"]
            share("disagreements with the second checker", disputes, regraded, t.warn_disagreement, t.stop_disagreement)
        if total["completions"] >= t.minimum:
            faults = sum(total[f"fault_{reason}"] for reason in GRADER_FAULTS)
            share(
                "grading errors, timeouts and unreadable golds",
                faults,
                total["completions"],
                t.warn_faults,
                t.stop_faults,
            )
            for name in DETECTORS:
                share(
                    f"completions with {name.replace('_', ' ')}",
                    total[f"detector_{name}"],
                    total["completions"],
                    t.warn_detector,
                    2.0,
                )
        series = {name: values[-self.window :] for name, values in self.series.items()}
        if diverging(series.get("rewarded", []), series.get("second", [])):
            stop.append("the reward rises while the second checker's accuracy falls")
        if length_drift(series.get("length", [])):
            warn.append("the mean length has more than doubled or halved")
        suspects = self.suspected_golds()
        if suspects:
            warn.append(f"{len(suspects)} golds look wrong: all completions agree on another answer")
        return ("stop" if stop else "warn" if warn else "ok"), stop + warn

    def suspected_golds(self) -> dict[str, tuple[str, str, int]]:
        """sample id -> (gold, the answer that completions agree on instead, how many of them)."""
        out = {}
        for sample, answers in self.wrong_answers.items():
            if self.rewarded[sample]:
                continue
            answer, votes = answers.most_common(1)[0]
            if votes >= self.thresholds.suspect_gold and votes >= 0.75 * sum(answers.values()):
                out[sample] = (self.golds[sample], answer, votes)
        return out

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        decision, reasons = self.decide()
        return {
            "decision": decision,
            "reasons": reasons,
            "totals": dict(self.totals),
            "table": {
                f"reward_{'right' if a else 'wrong'}_second_{'right' if b else 'wrong'}": n
                for (a, b), n in sorted(self.table.items())
            },
            "suspected_golds": {k: list(v) for k, v in self.suspected_golds().items()},
            "quarantined": self.quarantined,
            "thresholds": asdict(self.thresholds),
        }

    def _quarantine(self) -> list[str]:
        """Rules: a suspected gold; two faults of grading; two disputes. Returns the new ones."""
        before = set(self.quarantined)
        for sample in self.suspected_golds():
            self.quarantined.setdefault(sample, "suspected gold")
        for counter, why in ((self.faulty, "grading faults"), (self.disputed, "disputed by the second checker")):
            for sample, number in counter.items():
                if number >= 2:
                    self.quarantined.setdefault(sample, why)
        return sorted(set(self.quarantined) - before)

    def _chosen(self, step: int, row: Mapping[str, Any]) -> bool:
        digest = hashlib.blake2b(f"{step}|{row['sample_id']}|{row['rollout']}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.share * 2**64

    def _case(self, step: int, row: Mapping[str, Any], kind: str, second: bool | None) -> None:
        if sum(case.kind == kind for case in self.cases) >= max(1, self.keep // 8):
            return
        box = last_boxed(row["response"]) or ""
        case = Case(step, row["sample_id"], row["rollout"], kind, box[:300], row["gold"][:300], float(row["reward"]), bool(row["correct"]), second, row["response"][-1500:])  # fmt: skip  # noqa: E501
        self.cases.append(case)


def interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959964
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _normal(row: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in ("sample_id", "response", "gold", "reward", "correct", "reason") if name not in row]
    if missing:
        raise ValueError(f"a completion lacks {', '.join(missing)}")
    return {
        **row,
        "sample_id": str(row["sample_id"]),
        "rollout": int(row.get("rollout", 0)),
        "problem": str(row.get("problem", row.get("prompt", ""))),
        "gold": str(row["gold"]),
        "tokens": row.get("tokens", len(str(row["response"]))),
    }
