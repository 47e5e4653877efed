"""The reward-checking stage beside a training run: a second opinion from the reward workers, thresholds, quarantine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from plumbline.errors import RewardsUnsound
from plumbline.rewards.checking.checker import RewardChecker, StepReport, Thresholds
from plumbline.rewards.checking.report import write_report
from plumbline.rewards.verdict import Verdict
from plumbline.rl.batch import Group
from plumbline.rl.config import RunConfig
from plumbline.rl.pool import Pool
from plumbline.rl.records import completion_rows

REPORT_EVERY = 10


class LeavesOut(Protocol):
    def leave_out(self, sample_ids: Iterable[str]) -> None: ...


class WorkersOpinion:
    """Spreads pairs for the second checker over the reward workers.

    Args:
        workers: reward actors.
        limit: setting and seconds; see faults.gather.
    """

    def __init__(self, workers: Pool, limit: tuple[str, float]) -> None:
        self.workers, self.limit = workers, limit

    def compare_many(self, pairs: list[tuple[str, str]], /) -> list[Verdict]:
        """Verdicts in order."""
        n = len(self.workers)
        dealt = [pairs[number::n] for number in range(n)]
        shares = self.workers.each("second_opinion", dealt, self.limit, "the second opinion on answers")
        return [shares[number % n][number // n] for number in range(len(pairs))]


class CheckingStage:
    """Feeds a run's groups to a RewardChecker and acts on what it says.

    Writes check.html, check.json, check_cases.jsonl and quarantine.txt into the run's folder: every tenth step, at the
    last one, and whenever there is a new reason to warn or to stop.

    Args:
        config: the run's; reward.checking decides. With a share of 0 the stage does nothing.
        workers: reward actors.
        sampler: told which samples to leave out (a Sampler, or the Collector that owns one).
        console: warnings go here, each once.
    """

    def __init__(self, config: RunConfig, workers: Pool, sampler: LeavesOut, console: Console) -> None:
        settings = config.reward.checking
        self.folder, self.last_step, self.stops = Path(config.folder), config.steps, settings.stop
        self.sampler, self.console = sampler, console
        self.decision = "ok"
        self.told: set[str] = set()
        self.report: StepReport | None = None
        self.checker: RewardChecker | None = None
        if settings.share > 0:
            names = Thresholds.__dataclass_fields__
            thresholds = Thresholds(**{name: getattr(settings, name) for name in names})
            self.checker = RewardChecker(
                settings.share,
                thresholds,
                second=WorkersOpinion(workers, ("rollout.timeout_seconds", config.rollout.timeout_seconds)),
                rules=settings.quarantine,
                window=settings.window_steps,
            )

    def check(self, step: int, groups: list[Group]) -> dict[str, float]:
        """Check a step's graded groups; the sampler leaves out what was quarantined. Returns figures for telemetry."""
        if self.checker is None:
            return {}
        self.report = report = self.checker.check(step, completion_rows(step, groups))
        if report.quarantined:
            try:
                self.sampler.leave_out(report.quarantined)
            except ValueError as error:
                raise RewardsUnsound(f"the reward check's quarantine leaves no sample to train on: {error}") from None
            self.console.print(
                f"reward check: {len(report.quarantined)} samples quarantined, {report.quarantined[0]!r} first; "
                f"see {self.folder / 'quarantine.txt'}",
                highlight=False,
            )
        changed = report.decision != self.decision
        for reason in report.reasons:
            # Its figures change from step to step; what it says does not.
            kind = f"{report.decision} {re.sub('[0-9]+', '', reason.split(':')[0])}"
            if kind not in self.told:
                self.told.add(kind)
                self.console.print(f"reward check, {report.decision}, step {step}: {reason}", highlight=False)
                changed = True
        if changed or report.quarantined or step % REPORT_EVERY == 0 or step == self.last_step:
            write_report(self.checker, self.folder, self.folder.name)
        self.decision = report.decision
        return report.counters

    def enforce(self) -> None:
        """Raise RewardsUnsound if the last step's decision was to stop, unless the run is told only to warn."""
        if self.report is not None and self.report.decision == "stop" and self.stops:
            raise RewardsUnsound(
                f"the reward check stops the run at step {self.report.step}: {self.report.reasons[0]}; "
                f"see {self.folder / 'check.html'} (reward.checking.stop=false only warns)"
            )

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it."""
        return None if self.checker is None else self.checker.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on where state_dict was taken (None: the stage was off then, and starts afresh)."""
        if self.checker is not None and state is not None:
            self.checker.load_state_dict(state)
            self.decision = self.checker.steps[-1][1] if self.checker.steps else "ok"
