"""plumbline: reinforcement learning on rule-checked maths, and the selection of the samples that matter."""

__version__ = "0.1.0"
