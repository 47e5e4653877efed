"""Evaluation: answering benchmarks, grading, figures with intervals, and repeating all of it from a manifest."""

from plumbline.rl.evaluation.run import Evaluation, evaluate, finished_evaluation

__all__ = ["Evaluation", "evaluate", "finished_evaluation"]
