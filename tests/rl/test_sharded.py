"""Two sharded learner processes (FSDP2 over gloo) give what one gives, and their checkpoint loads into either number."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbline.models.load import load_policy
from plumbline.rl import learner_state
from plumbline.rl.batch import TrainingBatch
from plumbline.rl.config import parse_config
from plumbline.rl.distributed import Ranks
from plumbline.rl.learner import Learner

KINDS = {
    "grpo": {"algorithm": {"kl_coefficient": 0.05}, "learner": {"clipping": {"method": "global"}}},
    "ppo": {
        "algorithm": {"advantage": "gae", "kl_coefficient": 0.05, "kl_in": "reward", "kl_estimator": "k1"},
        "learner": {"clipping": {"method": "adagc", "warmup_steps": 1}, "gradient_checkpointing": True},
    },
    "lora": {"algorithm": {}, "learner": {"lora": {"rank": 4}, "clipping": {"method": "zclip", "warmup_steps": 2}}},
}


def config(policy_path, kind):
    return parse_config(
        {
            "name": "sharded",
            "policy": {"path": policy_path, "device": "cpu"},
            "rollout": {"max_new_tokens": 12},
            # Five microbatches: they do not divide evenly over two ranks.
            "learner": {"learning_rate": 1e-3, "tokens_per_microbatch": 24, **KINDS[kind]["learner"]},
            "algorithm": KINDS[kind]["algorithm"],
        }
    )


def batch(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(10, 290, (length,), generator=generator).tolist()

    prompts = [prompt for _ in range(3) for prompt in [draw(2, 6)] * 2]
    completions = [draw(3, 12) for _ in prompts]
    rewards = torch.rand(len(prompts), generator=generator).tolist()
    return TrainingBatch(prompts, completions, [[-5.7] * len(ids) for ids in completions], rewards, 2)


def steps(learner, first, last):
    return [learner.update(batch(step)) for step in range(first, last)]


def worker(rank, address, policy_path, kind, folder):
    """One of two processes; this file is their program."""
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, 2, address, "cpu", 300)
    learner = Learner(config(policy_path, kind), "cpu", ranks)
    metrics = steps(learner, 0, 2)
    learner_state.save(learner, folder / "two")
    again = Learner(config(policy_path, kind), "cpu", ranks)
    learner_state.load(again, folder / "one")
    metrics += steps(again, 2, 4)
    weights = learner_state.policy_weights(again)
    if rank == 0:
        torch.save({"metrics": metrics, "weights": weights}, folder / "result.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, policy_path, tmp_path):
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    one = Learner(config(policy_path, kind), "cpu")
    metrics = steps(one, 0, 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    learner_state.save(one, tmp_path / "one")
    metrics += steps(one, 2, 4)

    program = [sys.executable, __file__, address, policy_path, kind, str(tmp_path)]
    both = [subprocess.Popen([*program, str(rank)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    for a, b in zip(metrics, result["metrics"], strict=True):
        for name in ("learner/loss", "learner/gradient_norm", "learner/entropy", "learner/ratio_max"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    resumed = Learner(config(policy_path, kind), "cpu")
    learner_state.load(resumed, tmp_path / "two")
    steps(resumed, 2, 4)
    start = load_policy(policy_path, dtype=torch.float32)
    straight, from_two = learner_state.policy_weights(one), learner_state.policy_weights(resumed)
    for name, parameter in start.named_parameters():
        # AdamW turns the rounding of a gradient near zero into a step of full size; hence a share of the way moved.
        way = (straight[name] - parameter).norm() + 1e-9
        assert (result["weights"][name] - straight[name]).norm() <= 1e-2 * way, name
        assert (from_two[name] - straight[name]).norm() <= 1e-2 * way, name


if __name__ == "__main__":
    address, policy_path, kind, folder, rank = sys.argv[1:]
    worker(int(rank), address, policy_path, kind, Path(folder))
