"""The reward checker: fed with completions step by step, it re-grades a share of them with the second checker, counts
disagreements and detector hits, quarantines samples and says whether to warn or stop."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, Literal, Protocol

from plumbline.rewards.checking.detectors import DETECTORS, diverging, length_drift
from plumbline.rewards.extraction import last_boxed
from plumbline.rewards.verdict import Verdict
from plumbline.rewards.verifier import unbox
from plumbline.rewards.workers import Grader

Decision = Literal["ok", "warn", "stop"]
DECISIONS: tuple[Decision, ...] = ("ok", "warn", "stop")
GRADER_FAULTS = ("error", "timeout", "bad_gold")
RULES = ("suspected_gold", "grading_faults", "disputed")
# Share of a sample's answers that must agree against its gold.
SUSPECT_MAJORITY = 0.6
# Different wrong answers of one sample that are remembered; an agreeing policy gives its own at once.
MAX_ANSWERS = 32


class SecondOpinion(Protocol):
    """Whatever compares (answer, gold) pairs with the second checker, in order."""

    def compare_many(self, pairs: list[tuple[str, str]], /) -> list[Verdict]: ...


@dataclass(frozen=True)
class Thresholds:
    """Shares of completions at which a run is warned about or stopped.

    Attributes:
        warn_false_reward, stop_false_reward: rewarded completions that the second checker holds wrong, of those re-graded.
        warn_disagreement, stop_disagreement: all disagreements, of those re-graded.
        warn_faults, stop_faults: errors, timeouts and unreadable golds, of all.
        warn_detector: hits of any one detector among all completions.
        minimum: completions re-graded before a share of them counts.
        suspect_gold: like answers of one sample, most of all it got, that the gold calls wrong, before the gold is suspected.
        credit: a reward of at least this says that the answer is right, whatever the verdict was; None looks at the verdict
            alone (for rewards that are no measure of correctness).
    """

    warn_false_reward: float = 0.02
    stop_false_reward: float = 0.20
    warn_disagreement: float = 0.05
    stop_disagreement: float = 0.30
    warn_faults: float = 0.01
    stop_faults: float = 0.20
    warn_detector: float = 0.20
    minimum: int = 20
    suspect_gold: int = 4
    credit: float | None = 0.5


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
        second: who compares with the second checker; None starts killable children of its own.
        processes, timeout: of these children.
        rules: which quarantine rules apply, of RULES.
        keep: cases kept with their text.
        window: last steps that are judged by themselves too, and over which drifts are looked for.
    """

    def __init__(
        self,
        share: float = 0.1,
        thresholds: Thresholds | None = None,
        *,
        second: SecondOpinion | None = None,
        processes: int = 1,
        timeout: float = 2.0,
        rules: Iterable[str] = RULES,
        keep: int = 200,
        window: int = 20,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share ({share}) must be above 0 and at most 1")
        self.share, self.thresholds, self.keep, self.window = share, thresholds or Thresholds(), keep, window
        self.rules = tuple(rules)
        if unknown := set(self.rules) - set(RULES):
            raise ValueError(f"unknown quarantine rule {min(unknown)!r}; there are {', '.join(RULES)}")
        self.own = Grader(processes, timeout, second=True) if second is None else None
        self.second: SecondOpinion = second or self.own  # type: ignore[assignment]
        self.totals: Counter[str] = Counter()
        self.recent: deque[Counter[str]] = deque(maxlen=window)
        self.cases: list[Case] = []
        self.steps: list[tuple[int, Decision]] = []
        self.series: dict[str, list[float]] = defaultdict(list)
        self.wrong_answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.golds: dict[str, str] = {}
        self.rewarded: Counter[str] = Counter()
        self.faulty: Counter[str] = Counter()
        self.disputed: Counter[str] = Counter()
        self.quarantined: dict[str, str] = {}

    def close(self) -> None:
        """End its own children."""
        if self.own is not None:
            self.own.close()

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
        """
        given = [_normal(row) for row in rows]
        count: Counter[str] = Counter(completions=len(given))
        for row in given:
            self._look_at(step, row, count)
        chosen = [row for row in given if row["reason"] not in GRADER_FAULTS and self._chosen(step, row)]
        self._grade_again(step, chosen, count)
        self.totals.update(count)
        self.recent.append(count)
        if given:
            self.series["rewarded"].append(count["rewarded"] / len(given))
            self.series["length"].append(sum(float(row["tokens"]) for row in given) / len(given))
            regraded = count["regraded"]
            self.series["second"].append(count["second_right"] / regraded if regraded else float("nan"))
        fresh = self._quarantine()
        decision, reasons = self.decide()
        self.steps.append((step, decision))
        return StepReport(step, self._counters(count, decision), decision, reasons, fresh)

    def _look_at(self, step: int, row: dict[str, Any], count: Counter[str]) -> None:
        """Faults of grading, detectors, and what the sample's completions answer."""
        sample = row["sample_id"]
        self.golds[sample] = row["gold"]
        right = self._credited(row)
        count["rewarded"] += right
        self.rewarded[sample] += right
        if row["reason"] in GRADER_FAULTS:
            count[f"fault_{row['reason']}"] += 1
            self.faulty[sample] += 1
            self._case(step, row, row["reason"], None)
        for name, detector in DETECTORS.items():
            if detector(row["problem"], row["response"]):
                count[f"detector_{name}"] += 1
                self._case(step, row, name, None)
        box = last_boxed(row["response"])
        if not right and box is not None and row["reason"] == "wrong":
            answers, answer = self.wrong_answers[sample], "".join(box.split())[:300]
            if answer in answers or len(answers) < MAX_ANSWERS:
                answers[answer] += 1

    def _grade_again(self, step: int, rows: list[dict[str, Any]], count: Counter[str]) -> None:
        """The second checker's opinion of these completions; one without an answer is wrong."""
        boxes = [last_boxed(row["response"]) for row in rows]
        pairs = [(box, unbox(row["gold"])) for row, box in zip(rows, boxes, strict=True) if box and box.strip()]
        verdicts = iter(self.second.compare_many(pairs))
        for row, box in zip(rows, boxes, strict=True):
            second = False
            if box and box.strip():
                verdict = next(verdicts)
                if verdict.reason not in ("correct", "wrong"):
                    count[f"second_{verdict.reason}"] += 1
                    continue
                second = verdict.correct
            first = self._credited(row)
            count["regraded"] += 1
            count["second_right"] += second
            count[f"reward_{'right' if first else 'wrong'}_second_{'right' if second else 'wrong'}"] += 1
            if first != second:
                # A right answer that shaping punished (for its length, say) is no dispute about correctness.
                if second and row["correct"]:
                    continue
                kind = "false_reward" if first else "missed_reward"
                count[kind] += 1
                self.disputed[row["sample_id"]] += 1
                self._case(step, row, kind, second)

    def _credited(self, row: Mapping[str, Any]) -> bool:
        credit = self.thresholds.credit
        return bool(row["correct"]) or (credit is not None and float(row["reward"]) >= credit)

    def _counters(self, count: Counter[str], decision: Decision) -> dict[str, float]:
        """Figures for telemetry, the same names every step: counts of this step, the decision as 0, 1 or 2."""
        names = ["completions", "rewarded", "regraded", "second_right", "false_reward", "missed_reward"]
        names += [f"fault_{reason}" for reason in GRADER_FAULTS] + [f"second_{r}" for r in ("error", "timeout")]
        names += [f"detector_{name}" for name in DETECTORS]
        counters = {f"check/{name}": float(count[name]) for name in names}
        counters["check/quarantined"] = float(len(self.quarantined))
        counters["check/suspected_golds"] = float(len(self.suspected_golds()))
        counters["check/decision"] = float(DECISIONS.index(decision))
        return counters

    def decide(self) -> tuple[Decision, list[str]]:
        """The decision over everything seen and over the last `window` steps, with a sentence for each threshold passed."""
        stop, warn = self._judge(self.totals, "")
        if len(self.steps) > self.window:
            # Trouble that began late is diluted in the whole.
            known = {sentence.partition(":")[0] for sentence in stop}
            late_stop, late_warn = self._judge(sum(self.recent, Counter()), f" in the last {self.window} steps")
            stop += [s for s in late_stop if s.partition(":")[0].partition(" in the last")[0] not in known]
            known |= {sentence.partition(":")[0] for sentence in warn}
            warn += [s for s in late_warn if s.partition(":")[0].partition(" in the last")[0] not in known]
        series = {name: values[-self.window :] for name, values in self.series.items()}
        if diverging(list(self.recent)):
            stop.append("the reward rises while the second checker's accuracy falls")
        if length_drift(series.get("length", [])):
            warn.append("the mean length has more than doubled or halved")
        if suspects := self.suspected_golds():
            warn.append(f"{len(suspects)} golds look wrong: most completions agree on another answer")
        return ("stop" if stop else "warn" if warn else "ok"), stop + warn

    def _judge(self, total: Counter[str], when: str) -> tuple[list[str], list[str]]:
        """Sentences (stop, warn) for the thresholds that these counts pass."""
        t = self.thresholds
        warn: list[str] = []
        stop: list[str] = []

        def share(label: str, hits: int, of: int, warn_at: float, stop_at: float) -> None:
            if of >= t.minimum and hits / of >= warn_at:
                low, high = interval(hits, of)
                sentence = f"{label}{when}: {hits} of {of} ({hits / of:.1%}, 95% interval {low:.1%} to {high:.1%})"
                (stop if hits / of >= stop_at else warn).append(sentence)

        regraded, completions = total["regraded"], total["completions"]
        false, disputes = total["false_reward"], total["false_reward"] + total["missed_reward"]
        share("rewarded answers that the second checker holds wrong", false, regraded, t.warn_false_reward, t.stop_false_reward)  # fmt: skip
        share("disagreements with the second checker", disputes, regraded, t.warn_disagreement, t.stop_disagreement)
        faults = sum(total[f"fault_{reason}"] for reason in GRADER_FAULTS)
        share("grading errors, timeouts and unreadable golds", faults, completions, t.warn_faults, t.stop_faults)
        for name in DETECTORS:
            hits = total[f"detector_{name}"]
            share(f"completions with {name.replace('_', ' ')}", hits, completions, t.warn_detector, 2.0)
        return stop, warn

    def suspected_golds(self) -> dict[str, tuple[str, str, int]]:
        """sample id -> (gold, the answer that most completions agree on instead, how many of them).

        The gold need not be without any hit: guesses meet a wrong gold now and then.
        """
        out = {}
        for sample, answers in self.wrong_answers.items():
            answer, votes = answers.most_common(1)[0]
            hits = self.rewarded[sample]
            enough = votes >= self.thresholds.suspect_gold and votes >= SUSPECT_MAJORITY * (
                hits + sum(answers.values())
            )
            if enough and votes >= 4 * hits:
                out[sample] = (self.golds[sample], answer, votes)
        return out

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        decision, reasons = self.decide()
        return {
            "decision": decision,
            "reasons": reasons,
            "totals": dict(sorted(self.totals.items())),
            "steps": [{"step": step, "decision": decision} for step, decision in self.steps],
            "suspected_golds": {k: list(v) for k, v in self.suspected_golds().items()},
            "quarantined": self.quarantined,
            "thresholds": asdict(self.thresholds),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything it remembers, as plain data."""
        return {
            "totals": dict(self.totals),
            "recent": [dict(count) for count in self.recent],
            "cases": [asdict(case) for case in self.cases],
            "steps": [list(step) for step in self.steps],
            "series": {k: [None if x != x else x for x in v] for k, v in self.series.items()},
            "wrong_answers": {k: dict(v) for k, v in self.wrong_answers.items()},
            "golds": self.golds,
            "rewarded": dict(self.rewarded),
            "faulty": dict(self.faulty),
            "disputed": dict(self.disputed),
            "quarantined": self.quarantined,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where state_dict was taken."""
        self.totals = Counter(state["totals"])
        self.recent = deque((Counter(count) for count in state["recent"]), maxlen=self.window)
        self.cases = [Case(**case) for case in state["cases"]]
        self.steps = [(int(step), decision) for step, decision in state["steps"]]
        series = {k: [float("nan") if x is None else x for x in v] for k, v in state["series"].items()}
        self.series = defaultdict(list, series)
        self.wrong_answers = defaultdict(Counter, {k: Counter(v) for k, v in state["wrong_answers"].items()})
        self.golds = dict(state["golds"])
        self.rewarded, self.faulty, self.disputed = (Counter(state[k]) for k in ("rewarded", "faulty", "disputed"))
        self.quarantined = dict(state["quarantined"])

    def _quarantine(self) -> list[str]:
        """Rules: a suspected gold; two faults of grading; two disputes. Returns the new ones."""
        before = set(self.quarantined)
        if "suspected_gold" in self.rules:
            for sample in self.suspected_golds():
                self.quarantined.setdefault(sample, "suspected gold")
        for rule, counter, why in (
            ("grading_faults", self.faulty, "grading faults"),
            ("disputed", self.disputed, "disputed by the second checker"),
        ):
            for sample, number in counter.items() if rule in self.rules else ():
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
        case = Case(step, row["sample_id"], row["rollout"], kind, box[:300], row["gold"][:300], float(row["reward"]), bool(row["correct"]), second, row["response"][-1500:])  # fmt: skip
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
