"""Every metric that a run publishes, once: the code, the dashboard, the documentation and the test read this list.

Names follow Prometheus: base units in the name, `ratio` for shares between 0 and 1. Ray puts `ray_` in front of them and
`_total` behind counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as given to Ray.
        kind: gauge, counter or histogram.
        unit: of its values.
        role: whose process publishes it: driver, rollout, reward or learner.
        about: what it says.
        panel: title of the dashboard panel that shows it.
        key: the driver's gauges: the column of metrics.jsonl it repeats.
        tags: labels besides `run` (driver) or `actor` (the others).
        low, high: values outside are wrong, whatever the run.
        when: "" if every training run has it, else what it takes.
        bounds: of a histogram's buckets.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    role: Literal["driver", "rollout", "reward", "learner"]
    about: str
    panel: str
    key: str = ""
    tags: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    when: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name as Prometheus sees it (a histogram's has `_bucket`, `_sum` and `_count` behind it)."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


def _step(name: str, key: str, unit: str, panel: str, about: str, **more: object) -> Metric:
    return Metric(f"plumbline_{name}", "gauge", unit, "driver", about, panel, key=key, **more)  # type: ignore[arg-type]


SHARE = {"low": 0.0, "high": 1.0}
POSITIVE = {"low": 0.0}

METRICS: tuple[Metric, ...] = (
    _step("step", "step", "steps", "Progress", "Training steps done.", **POSITIVE),
    _step(
        "policy_version",
        "policy_version",
        "versions",
        "Progress",
        "Version of the weights that roll out next.",
        **POSITIVE,
    ),
    _step("reward_mean", "reward/mean", "reward", "Reward", "Mean reward of the step's completions."),
    _step("correct_ratio", "reward/correct", "ratio", "Reward", "Share of completions graded correct.", **SHARE),
    _step(
        "groups_without_signal_ratio",
        "reward/groups_without_signal",
        "ratio",
        "Reward",
        "Share of groups whose rewards are all the same: no gradient.",
        **SHARE,
    ),
    _step(
        "completion_length_tokens",
        "rollout/completion_tokens",
        "tokens",
        "Completion length",
        "Mean length.",
        **POSITIVE,
    ),
    _step(
        "truncated_ratio", "rollout/truncated", "ratio", "Completion length", "Share cut at max_new_tokens.", **SHARE
    ),
    _step(
        "rollout_tokens_per_second",
        "rollout/tokens_per_second",
        "tokens/s",
        "Throughput",
        "Completion tokens by seconds of rollout and grading.",
        **POSITIVE,
    ),
    _step("loss", "learner/loss", "loss", "Loss", "Policy loss, KL included where it is in the loss."),
    _step("entropy_nats", "learner/entropy", "nats/token", "Entropy and KL", "Entropy of the policy.", low=-1e-6),
    _step(
        "kl_rollout_nats",
        "learner/approx_kl",
        "nats/token",
        "Entropy and KL",
        "KL to the policy that rolled out (k3).",
        low=-1e-6,
    ),
    _step(
        "kl_reference_nats",
        "learner/kl_reference",
        "nats/token",
        "Entropy and KL",
        "KL to the starting policy.",
        when="algorithm.kl_coefficient > 0",
    ),
    _step(
        "clip_low_ratio",
        "learner/clip_fraction_low",
        "ratio",
        "Clipping",
        "Share of tokens clipped at the floor.",
        **SHARE,
    ),
    _step(
        "clip_high_ratio",
        "learner/clip_fraction_high",
        "ratio",
        "Clipping",
        "Share of tokens clipped at the ceiling.",
        **SHARE,
    ),
    _step(
        "importance_ratio_mean",
        "learner/ratio_mean",
        "ratio of probabilities",
        "Importance ratio",
        "Mean over tokens, unclipped.",
        **POSITIVE,
    ),
    _step(
        "importance_ratio_max",
        "learner/ratio_max",
        "ratio of probabilities",
        "Importance ratio",
        "Largest of the step.",
        **POSITIVE,
    ),
    _step("gradient_norm", "learner/gradient_norm", "norm", "Gradient", "Before clipping.", **POSITIVE),
    _step("learning_rate", "learner/learning_rate", "1", "Gradient", "Of the last optimizer step.", **POSITIVE),
    _step(
        "skipped_optimizer_steps",
        "learner/skipped_steps",
        "steps",
        "Gradient",
        "Of the training step, for NaN or Inf.",
        **POSITIVE,
    ),
    _step("step_seconds", "time/step_seconds", "s", "Where the time goes", "Wall time of the step.", **POSITIVE),
    _step(
        "stall_learner_seconds",
        "stall/learner_seconds",
        "s",
        "Where the time goes",
        "Of the step, in which the learner had nothing to do: it waited for rollout and grading.",
        **POSITIVE,
    ),
    _step(
        "stall_rollout_seconds",
        "stall/rollout_seconds",
        "s",
        "Where the time goes",
        "Of the step, in which rollout workers had nothing to do, their mean: they waited for the learner.",
        **POSITIVE,
    ),
    _step(
        "stall_reward_seconds",
        "stall/reward_seconds",
        "s",
        "Where the time goes",
        "Of the step, in which reward workers had nothing to grade, their mean.",
        **POSITIVE,
    ),
    _step(
        "staleness_versions",
        "rollout/staleness",
        "versions",
        "Queues and staleness",
        "Updates between the weights of a group's oldest token and those that learn from it, mean over groups.",
        **POSITIVE,
    ),
    _step(
        "staleness_max_versions",
        "rollout/staleness_max",
        "versions",
        "Queues and staleness",
        "The same, of the step's oldest group: at most rollout.max_staleness_steps.",
        **POSITIVE,
    ),
    _step(
        "carried_over_ratio",
        "rollout/carried_over",
        "ratio",
        "Completion length",
        "Share of completions that new weights carried on.",
        **SHARE,
    ),
    _step(
        "replaced_workers",
        "replaced_workers",
        "workers",
        "Progress",
        "Rollout and reward workers that died or hung and were replaced, since the start.",
        **POSITIVE,
    ),
    _step(
        "grader_no_answer_ratio", "grader/no_answer", "ratio", "Grader", "Completions without a complete box.", **SHARE
    ),
    _step("grader_malformed_ratio", "grader/malformed", "ratio", "Grader", "Empty boxes, or several answers.", **SHARE),
    _step("grader_timeout_ratio", "grader/timeout", "ratio", "Grader", "Gradings killed at their time limit.", **SHARE),
    _step("grader_error_ratio", "grader/error", "ratio", "Grader", "Gradings that failed.", **SHARE),
    _step("grader_bad_gold_ratio", "grader/bad_gold", "ratio", "Grader", "Golds that cannot be read.", **SHARE),
    _step(
        "evaluation_accuracy_ratio",
        "evaluation/accuracy",
        "ratio",
        "Held out",
        "Accuracy on config.evaluation's problems, measured now and then.",
        when="evaluation.every_steps > 0",
        **SHARE,
    ),
    _step(
        "selection_epoch",
        "selection/epoch",
        "epochs",
        "Selection",
        "Pass over the training set, of the step's last prompt.",
        **POSITIVE,
    ),
    _step("selection_samples", "selection/samples", "samples", "Selection", "Training samples to draw from.", low=1.0),
    _step(
        "selection_solved_ratio",
        "selection/solved",
        "ratio",
        "Selection",
        "Groups of the step that are all correct: samples with nothing left to teach.",
        **SHARE,
    ),
    _step(
        "selection_unsolved_ratio",
        "selection/unsolved",
        "ratio",
        "Selection",
        "Groups of the step without one correct completion.",
        **SHARE,
    ),
    _step(
        "selection_rounds",
        "selection/rounds",
        "rounds",
        "Filling a step",
        "Rollout rounds that filled the step: more than one when groups are dropped.",
        low=1.0,
    ),
    _step(
        "selection_rolled_out_groups",
        "selection/groups_rolled_out",
        "groups",
        "Filling a step",
        "Groups rolled out for the step, dropped ones and first looks too.",
        **POSITIVE,
    ),
    _step(
        "selection_kept_groups",
        "selection/groups_kept",
        "groups",
        "Filling a step",
        "Groups that the sampler kept to train on.",
        **POSITIVE,
    ),
    _step(
        "selection_open_ratio",
        "selection/open_share",
        "ratio",
        "Sampler",
        "Share of the samples open to be drawn, the easiest first.",
        when="selection.sampler.name=curriculum",
        **SHARE,
    ),
    _step(
        "selection_tried_samples",
        "selection/tried",
        "samples",
        "Sampler",
        "Samples drawn at least once.",
        when="selection.sampler.name=prioritised",
        **POSITIVE,
    ),
    _step(
        "selection_always_right_samples",
        "selection/always_right",
        "samples",
        "Sampler",
        "Samples whose success rate is 1: drawn only when nothing else is left.",
        when="selection.sampler.name=prioritised",
        **POSITIVE,
    ),
    _step(
        "selection_skipped_prompts",
        "selection/skipped",
        "prompts",
        "Sampler",
        "Prompts passed over so far, because their last group was flat.",
        when="selection.sampler.name=greso",
        **POSITIVE,
    ),
    _step(
        "selection_explore_easy_ratio",
        "selection/explore_easy",
        "ratio",
        "Sampler",
        "Chance to try a prompt whose last group was all right.",
        when="selection.sampler.name=greso",
        **SHARE,
    ),
    _step(
        "selection_explore_hard_ratio",
        "selection/explore_hard",
        "ratio",
        "Sampler",
        "Chance to try a prompt whose last group was all wrong.",
        when="selection.sampler.name=greso",
        **SHARE,
    ),
    _step(
        "selection_waiting_prompts",
        "selection/waiting",
        "prompts",
        "Sampler",
        "Prompts past their first look that wait for the rest of their group.",
        when="selection.sampler.name=speed",
        **POSITIVE,
    ),
    Metric(
        "plumbline_grading_queue_groups",
        "gauge",
        "groups",
        "driver",
        "Groups sent to graders and not back yet.",
        "Queues and staleness",
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_rollout_queue_prompts",
        "gauge",
        "prompts",
        "rollout",
        "Prompts of the present batch without a finished group.",
        "Queues and staleness",
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_generated_tokens",
        "counter",
        "tokens",
        "rollout",
        "Completion tokens generated.",
        "Throughput",
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_generated_completions",
        "counter",
        "completions",
        "rollout",
        "Completions generated.",
        "Throughput",
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_graded_completions",
        "counter",
        "completions",
        "reward",
        "Completions graded, by verdict.",
        "Grader",
        tags=("reason",),
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_grading_seconds",
        "histogram",
        "s",
        "reward",
        "Time to grade a group.",
        "Grading time",
        bounds=(0.001, 0.01, 0.1, 1.0, 10.0, 100.0),
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_learner_update_seconds",
        "histogram",
        "s",
        "learner",
        "Time of one update, all its optimizer steps.",
        "Where the time goes",
        bounds=(0.1, 1.0, 10.0, 100.0, 1000.0),
        **POSITIVE,  # type: ignore[arg-type]
    ),
    Metric(
        "plumbline_gpu_memory_bytes",
        "gauge",
        "bytes",
        "learner",
        "Allocated by torch in this process, at its peak since the last report; rollout workers publish it too.",
        "GPU memory",
        when="a GPU",
        **POSITIVE,  # type: ignore[arg-type]
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def panels() -> dict[str, list[Metric]]:
    """Title -> its metrics, in the order of the list."""
    found: dict[str, list[Metric]] = {}
    for metric in METRICS:
        found.setdefault(metric.panel, []).append(metric)
    return found


def markdown() -> str:
    """The table of docs/monitoring.md."""
    lines = ["| metric in Prometheus | kind | unit | published by | what it says |", "|---|---|---|---|---|"]
    for metric in METRICS:
        about = metric.about + (f" Only with {metric.when}." if metric.when else "")
        lines.append(f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {metric.role} | {about} |")
    return "\n".join(lines)
