"""`plumbline train` killed with SIGKILL at moments of chance, and resumed, ends bit for bit as the run nobody killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from plumbline.models.load import load_policy
from plumbline.rl.telemetry import read_metrics
from plumbline.selection.history import read_history

STEPS = 6
DEADLINE = 1200


def write_config(policy_path, folder, name):
    tree = {
        "name": "killed",
        "output": str(folder / name),
        "steps": STEPS,
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 10},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 6},
        "learner": {
            "learning_rate": 1e-2,
            "tokens_per_microbatch": 64,
            "threads": 1,
            "clipping": {"method": "adagc", "warmup_steps": 2},
        },
        "reward": {"shaping": "plumbline.testing:short_is_good", "checking": {"share": 0.5, "credit": None}},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "ray": {"dashboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def start(config, *arguments):
    command = [sys.executable, "-c", "from plumbline.cli import main; main()", "train", config, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    return output


def wait_for(process, condition):
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.002)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0)  # chance may come too late


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(policy_path, tmp_path):
    finished(start(write_config(policy_path, tmp_path, "straight")))
    config, folder = write_config(policy_path, tmp_path, "killed"), tmp_path / "killed"
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)

    # Before the first checkpoint, then while one is written, then anywhere in a step.
    process = start(config)
    wait_for(process, lambda: (folder / "history").is_dir())
    time.sleep(chance.uniform(0, 2))
    kill(process)
    process = start(config, "--resume")
    wait_for(
        process, lambda: any(folder.glob("checkpoints/partial-*/policy")) and any(folder.glob("checkpoints/step-*"))
    )
    time.sleep(chance.uniform(0, 0.1))
    kill(process)
    begun = len(read_metrics(folder))
    process = start(config, "--resume")
    wait_for(process, lambda: len(read_metrics(folder)) > begun or begun >= STEPS - 1)
    time.sleep(chance.uniform(0, 1))
    kill(process)
    finished(start(config, "--resume"))

    last = f"checkpoints/step-{STEPS:06d}/policy"
    whole, parts = (load_policy(str(tmp_path / name / last), dtype=torch.float32) for name in ("straight", "killed"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    histories = [read_history(tmp_path / name / "history").to_pylist() for name in ("straight", "killed")]
    assert histories[0] == histories[1]
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, STEPS + 1))
    assert not list(folder.glob("checkpoints/partial-*"))
