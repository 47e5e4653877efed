"""Evaluation: answering benchmarks, grading, figures with intervals, and repeating all of it from a manifest."""

from plumbline.rl.evaluation.run import evaluate, finished_evaluation
from plumbline.rl.evaluation.scores import Evaluation

__all__ = ["Evaluation", "evaluate", "finished_evaluation"]
