"""`plumbline train` and `plumbline evaluate` with vLLM as the engine, on the CPU. Skipped without vLLM."""

import pytest
from rich.console import Console

from plumbline.rl.config import parse_config
from plumbline.rl.evaluation.launch import launch_evaluation
from plumbline.rl.evaluation.request import Request
from plumbline.rl.files import read_rows
from plumbline.rl.launch import launch_training
from plumbline.rl.telemetry import read_metrics

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def test_two_steps_and_an_evaluation_of_what_they_made(tmp_path):
    """The policy has sparse attention and so runs through the plug-in. After each step its weights go to vLLM."""
    tree = {
        "name": "vllm",
        "output": str(tmp_path / "run"),
        "steps": 2,
        "policy": {"path": "embedded", "device": "cpu"},
        "prompt": {"max_tokens": 96},
        "data": {"limit": 8},
        "rollout": {
            "engine": "vllm",
            "prompts_per_step": 4,
            "completions_per_prompt": 4,
            "max_new_tokens": 48,
            "slots": 16,
        },
        "learner": {"learning_rate": 1e-3, "threads": 1},
        # Ratios of new to rollout log-probabilities, over tokens of weights that were not trained since.
        "algorithm": {"correction": {"method": "mask", "low": 0.999, "high": 1.001}},
        "reward": {"checking": {"share": 0}},
        "ray": {"dashboard": False, "start_timeout_seconds": 900},
    }
    config = parse_config(tree)
    launch_training(config, Console(quiet=True))
    rows = read_metrics(config.folder)
    assert [row["policy_version"] for row in rows] == [1, 2]
    for row in rows:
        # vLLM sampled with the very weights that the learner holds: no token's probability is off by a thousandth.
        assert row["learner/correction_zeroed"] == 0
        assert row["learner/correction_mean"] == pytest.approx(1, abs=1e-4)
        assert row["rollout/completions"] == 16

    folder = tmp_path / "evaluation"
    assert launch_evaluation(
        Request(
            model=str(config.folder / "checkpoints" / "step-000002"),
            benchmarks=["procedural:heldout"],
            limit=4,
            completions=2,
            temperature=0.6,
            top_p=0.95,
            max_new_tokens=64,  # longer than training's
            engine="vllm",
            slots=4,
            device="cpu",
            output=folder,
        ),
        Console(quiet=True),
    )
    found = read_rows(folder / "procedural-heldout.jsonl")
    assert len(found) == 8
