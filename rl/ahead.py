"""Rolling out ahead of the learner: the next steps are filled while it works on this one, a bounded number of updates early."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from plumbline.rl.collect import Collector, Filled
from plumbline.rl.config import RunConfig


class Ahead:
    """Gives each training step its groups, in order.

    With rollout.max_staleness_steps 0 a step is rolled out when it is asked for: rollout and learner take turns. With k
    over 0 a thread fills one step after the other as soon as its turn comes: step s is begun once the rollout workers
    have the weights of update s - 1 - k. Its first token is then at most k updates older than the weights that learn from
    it, and every later token is younger, since new weights reach the workers in the middle of a completion too.

    The steps are the same ones, filled in the same order, whatever k is: only the weights they are drawn with differ.

    Args:
        collector: of the run.
        config: the run's.
        start: steps done already.
    """

    def __init__(self, collector: Collector, config: RunConfig, start: int) -> None:
        self.collector, self.config, self.start = collector, config, start
        self.most = config.rollout.max_staleness_steps
        self.updates = start
        self.changed = threading.Condition()
        self.filled: dict[int, Filled] = {}
        self.states: dict[int, dict[str, Any]] = {}
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="rollout-ahead", daemon=True)

    def take(self, step: int) -> Filled:
        """The groups of a step, once they are graded. Raises what filling it raised; see Collector.fill."""
        if self.most == 0:
            return self.collector.fill(step)
        with self.changed:
            self.changed.wait_for(lambda: step in self.filled or self.error is not None)
            if step in self.filled:
                return self.filled.pop(step)
            assert self.error is not None
            raise self.error

    def trained(self, step: int) -> None:
        """The weights that step's update made are in the rollout workers."""
        with self.changed:
            self.updates = step
            self.changed.notify_all()

    def state(self, step: int) -> dict[str, Any]:
        """The collector's state after filling `step`, for its checkpoint: steps begun since then are begun again when the
        run resumes. Only for steps at which a checkpoint is due."""
        if self.most == 0:
            return self.collector.state_dict()
        with self.changed:
            state = self.states.pop(step)
        return state | {"left_out": self.collector.state_dict()["left_out"]}

    def _may_begin(self, step: int) -> bool:
        return step - 1 - self.most <= self.updates

    def _work(self) -> None:
        stopped = self.collector.roles.stop.is_set
        try:
            for step in range(self.start + 1, self.config.steps + 1):
                with self.changed:
                    while not (stopped() or self._may_begin(step)):
                        self.changed.wait()
                if stopped():
                    return
                filled = self.collector.fill(step)
                state = self.collector.state_dict() if self.config.checkpoint_due(step) else None
                with self.changed:
                    self.filled[step] = filled
                    if state is not None:
                        self.states[step] = state
                    self.changed.notify_all()
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()

    def __enter__(self) -> Ahead:
        if self.most:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.most:
            return
        stop = self.collector.roles.stop
        stop.set()
        with self.changed:
            self.changed.notify_all()
        self.thread.join()
        stop.clear()
