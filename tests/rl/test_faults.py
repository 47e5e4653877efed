"""Everything that can go wrong in a run, done to a real one on a local cluster: it finishes, or it stops with its cause
and goes on from its checkpoint as if nothing had happened."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
import yaml

from plumbline.errors import RunStopped
from plumbline.models.load import load_policy
from plumbline.rl import exchange, telemetry
from plumbline.rl.actors import LearnerWorker
from plumbline.rl.batch import Prompt, Sampling
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.faults import DeadlinePassed, RoleFailed, gather, resumable
from plumbline.rl.learner import NonFiniteGradients
from plumbline.rl.records import training_batch
from plumbline.selection.history import read_history
from plumbline.testing import changed, train_quietly

# What the reward of these runs does is in a file, so that one cluster serves every test.
REWARD = """
import os, signal, time
from pathlib import Path

def reward(completions, problem, **columns):
    what, _, whose = Path(os.environ["FAULT"]).read_text().partition(":")
    if whose in ("any", problem[0]):
        if what == "die once":
            Path(os.environ["FAULT"]).write_text("")
        if what.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang":
            time.sleep(600)
        if what == "raise":
            raise KeyError("a column this reward wants")
    return [-len(completion) / 10 for completion in completions]
"""


def tree(policy_path, output, **changes):
    made = {
        "name": "tiny",
        "output": str(output),
        "seed": 3,
        "steps": 3,
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 10},
        # One group at a time, so that there is always something left to lose.
        "rollout": {
            "prompts_per_step": 4,
            "completions_per_prompt": 3,
            "max_new_tokens": 40,
            "slots": 3,
            "cpus_per_worker": 0.01,
            "threads_per_worker": 1,
        },
        "learner": {"learning_rate": 1e-3, "tokens_per_microbatch": 512, "threads": 1, "cpus": 0.01},
        "reward": {
            "shaping": "faulty_reward:reward",
            "cpus_per_worker": 0.01,
            "checking": {"share": 0.5, "credit": None, "stop": False, "quarantine": []},
        },
        "checkpoint": {"every_steps": 1, "keep": 3},
        "ray": {"dashboard": False, "replacements_per_step": 2, "start_timeout_seconds": 400},
    }
    return changed(made, **changes)


def config(*arguments, **changes):
    return parse_config(tree(*arguments, **changes))


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The file that says what goes wrong; whatever starts later finds the reward that reads it."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "faulty_reward.py").write_text(REWARD)
    (folder / "fault").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULT", str(folder / "fault"))
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.syspath_prepend(str(folder))
        yield folder / "fault"


@pytest.fixture(autouse=True)
def no_fault_at_first(fault):
    fault.write_text("")


@pytest.fixture(scope="module")
def roles(policy_path, fault, tmp_path_factory):
    with Roles.start(config(policy_path, tmp_path_factory.mktemp("cluster"))) as roles:
        yield roles


@pytest.fixture(scope="module")
def straight(policy_path, roles, tmp_path_factory):
    cfg = config(policy_path, tmp_path_factory.mktemp("straight"))
    return cfg, train_quietly(cfg, roles)


def same(straight, cfg, result):
    """The run left the weights and the history, row for row, of one that nothing happened to."""
    source, whole = straight
    there, here = (load_policy(r.policy, dtype=torch.float32).state_dict() for r in (whole, result))
    for name, tensor in there.items():
        assert torch.equal(tensor, here[name]), name
    assert read_history(cfg.folder / "history").equals(read_history(source.folder / "history"))


@contextlib.contextmanager
def at_step(monkeypatch, wanted, act):
    """Within the block, `act()` once the first group of training step `wanted` is back."""
    whole = exchange.Exchange.run
    done = []

    def watched(self, prompts, completions, sampling):
        for group in whole(self, prompts, completions, sampling):
            if prompts[0].key == wanted and not done:
                done.append(act())
            yield group

    with monkeypatch.context() as patch:
        patch.setattr(exchange.Exchange, "run", watched)
        yield
    assert done


def prompts(*texts, token_ids=(5, 6, 7)):
    return [Prompt(number, f"s{number}", list(token_ids), text, "1") for number, text in enumerate(texts)]


def ask(roles, cfg, asked):
    roles.begin(cfg)
    return sorted(roles.graded_groups(asked, 3, Sampling(20)), key=lambda group: group.prompt.index)


@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_a_killed_worker_is_replaced_and_nothing_is_lost_or_counted_twice(
    role, straight, roles, policy_path, tmp_path, monkeypatch, caplog
):
    pool = getattr(roles, role)
    victim, replaced = pool.places[0].pid, pool.replaced
    cfg = config(policy_path, tmp_path)
    with at_step(monkeypatch, 2, lambda: os.kill(victim, signal.SIGKILL)):
        result = train_quietly(cfg, roles)
    assert pool.replaced == replaced + 1
    assert pool.places[0].pid != victim
    assert re.search(
        rf"{role}-0.* \(process {victim} on .*\) died: .*; its log .*\.err .*another takes its place", caplog.text
    )
    same(straight, cfg, result)


def test_a_reward_that_kills_its_worker_once_is_asked_again(roles, policy_path, tmp_path, fault):
    fault.write_text("die once:any")
    groups = ask(roles, config(policy_path, tmp_path), prompts(*"abcd"))
    assert [len(group.rewards) for group in groups] == [3] * 4
    assert not any(reason == "error" for group in groups for reason in group.reasons)


def test_a_group_that_kills_every_reward_worker_gets_its_own_verdict(roles, policy_path, tmp_path, fault):
    fault.write_text("die:b")
    groups = ask(roles, config(policy_path, tmp_path), prompts(*"abcd"))
    assert [set(group.reasons) == {"error"} for group in groups] == [False, True, False, False]
    assert groups[1].rewards == [0.0] * 3


def test_a_hanging_reward_gets_its_own_verdict_within_the_limit(roles, policy_path, tmp_path, fault):
    fault.write_text("hang:c")
    cfg = config(policy_path, tmp_path)
    cfg = cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"group_timeout_seconds": 4.0})})
    groups = ask(roles, cfg, prompts(*"abcd"))
    assert [set(group.reasons) == {"timeout"} for group in groups] == [False, False, True, False]


def test_a_reward_that_raises_stops_the_run_with_its_error(roles, policy_path, tmp_path, fault):
    fault.write_text("raise:d")
    with pytest.raises(
        RoleFailed,
        match=r"grading sample 's3' with reward\.shaping faulty_reward:reward: reward-0\S* raised KeyError: 'a column",
    ):
        ask(roles, config(policy_path, tmp_path), prompts(*"abcd"))


def test_an_engine_that_raises_stops_the_run_with_its_error(roles, policy_path, tmp_path):
    before = roles.rollout.replaced
    with pytest.raises(
        RoleFailed, match=r"rollout-0\S* raised IndexError: .*; 2 rollout workers were replaced in this step"
    ):
        ask(roles, config(policy_path, tmp_path), prompts("a", token_ids=[10**6]))
    assert roles.rollout.replaced == before + 2
    roles.rollout.settle()
    assert len(ask(roles, config(policy_path, tmp_path), prompts("a"))) == 1


def test_a_killed_learner_stops_the_run_and_another_goes_on(straight, roles, policy_path, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path)
    with Roles.start(cfg) as others:
        victim = others.learners.places[0].pid
        match = rf"learner-0\S* \(process {victim} on .*\) died: .*; its log .*; --resume goes on from .*step-00000[12]; details: "
        with (
            at_step(monkeypatch, 3, lambda: os.kill(victim, signal.SIGKILL)),
            pytest.raises(RunStopped, match=match),
            resumable(cfg.folder),
        ):
            train_quietly(cfg, others)
        assert "RoleFailed" in (cfg.folder / "failure.txt").read_text()
    same(straight, cfg, train_quietly(cfg, roles, resume=True))


def test_gradients_that_are_not_finite_are_skipped_and_then_stop_the_run(roles, policy_path, tmp_path):
    cfg = config(policy_path, tmp_path, learner__max_skipped_steps=1)
    groups = ask(roles, cfg, prompts("a", "b"))
    groups[0].rewards = [0.0, 1.0, 2.0]
    batch = training_batch(groups)
    batch.logprobs[0][0] = float("nan")
    first = roles.sync()
    assert roles.update(batch)()["learner/skipped_steps"] == 1
    weights = roles.published["checksum"]
    assert roles.sync() == first + 1
    assert roles.published["checksum"] == weights
    with pytest.raises(NonFiniteGradients, match="2 optimizer steps in a row had a NaN or Inf gradient"):
        roles.update(batch)()


@contextlib.contextmanager
def file_size_limit(pid, size):
    """The kernel refuses the process larger files, as it refuses any on a full disk."""
    process = psutil.Process(pid)
    before = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, before)


def test_a_checkpoint_the_disk_refuses(straight, roles, policy_path, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path)
    with contextlib.ExitStack() as limit:
        pid = roles.learners.places[0].pid
        match = r"File too large; earlier|File too large.*earlier ones are intact.*step-000001"
        with (
            at_step(monkeypatch, 2, lambda: limit.enter_context(file_size_limit(pid, 16_000))),
            pytest.raises(RunStopped, match=match),
            resumable(cfg.folder),
        ):
            train_quietly(cfg, roles)
    assert [path.name for path in (cfg.folder / "checkpoints").iterdir()] == ["step-000001"]
    same(straight, cfg, train_quietly(cfg, roles, resume=True))


needs_a_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")


@needs_a_full_device
def test_completions_that_the_disk_refuses_stop_the_run(straight, roles, policy_path, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path)
    path = cfg.folder / "completions" / "step-000002.jsonl.new"
    match = rf"{re.escape(str(path))}: No space left on device; --resume goes on from .*step-000001"
    with (
        at_step(monkeypatch, 2, lambda: path.symlink_to("/dev/full")),
        pytest.raises(RunStopped, match=match),
        resumable(cfg.folder),
    ):
        train_quietly(cfg, roles)
    path.unlink()
    same(straight, cfg, train_quietly(cfg, roles, resume=True))


def test_a_history_that_the_disk_refuses_stops_the_run(straight, roles, policy_path, tmp_path, monkeypatch):
    cfg = config(policy_path, tmp_path)
    with (
        contextlib.ExitStack() as limit,
        # The checkpoint of step 2 is still being written then, and refused as well.
        at_step(monkeypatch, 3, lambda: limit.enter_context(file_size_limit(os.getpid(), 1))),
        pytest.raises(RunStopped, match=r"File too large; --resume goes on from .*step-000001"),
        resumable(cfg.folder),
    ):
        train_quietly(cfg, roles)
    same(straight, cfg, train_quietly(cfg, roles, resume=True))


@needs_a_full_device
def test_metrics_that_the_disk_refuses_stop_the_run(straight, roles, policy_path, tmp_path, monkeypatch):
    """The open file is put on the full device: reading that back would never end."""
    cfg = config(policy_path, tmp_path)
    log, whole = telemetry.Telemetry.log, []

    def refused(self, step, metrics):
        if step == 2:
            whole.append(os.dup(self.file.fileno()))
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self.file.fileno())
            os.close(full)
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(telemetry.Telemetry, "log", refused)
        match = r"metrics\.jsonl: No space left on device; --resume goes on from .*step-000001"
        with pytest.raises(RunStopped, match=match), resumable(cfg.folder):
            train_quietly(cfg, roles)
    os.close(whole[0])
    same(straight, cfg, train_quietly(cfg, roles, resume=True))


@contextlib.contextmanager
def halted(place):
    """The process stands still, as on a machine that swaps."""
    os.kill(place.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(place.pid, signal.SIGCONT)


def test_every_wait_for_an_actor_has_a_deadline(roles, policy_path, tmp_path):
    cfg = config(
        policy_path,
        tmp_path,
        learner__update_timeout_seconds=2,
        ray__transfer_timeout_seconds=60,
        rollout__timeout_seconds=60,
    )
    batch = training_batch(ask(roles, cfg, prompts("a", "b")))
    learner, worker = roles.learners.places[0], roles.rollout.places[0]
    with (
        halted(learner),
        pytest.raises(
            DeadlinePassed, match=r"update: no answer from learner-0\S* within learner\.update_timeout_seconds = 2 s"
        ),
    ):
        roles.update(batch)()
    quick = cfg.model_copy(update={"ray": cfg.ray.model_copy(update={"transfer_timeout_seconds": 2.0})})
    quick = quick.model_copy(update={"rollout": cfg.rollout.model_copy(update={"timeout_seconds": 2.0})})
    roles.config = quick
    with halted(worker):
        with pytest.raises(
            DeadlinePassed, match=r"weights for rollout-0\S*: no answer .* within ray\.transfer_timeout_seconds = 2 s"
        ):
            roles.sync()
        with pytest.raises(
            DeadlinePassed,
            match=r"2 of 2 groups were not back after rollout\.timeout_seconds = 2: rollout-0\S* owes 2 \(its log",
        ):
            list(roles.graded_groups(prompts("a", "b"), 3, Sampling(20)))
    with halted(learner), pytest.raises(DeadlinePassed, match="copying the state for "):
        roles.save(tmp_path)


def test_learners_that_do_not_meet_are_one_line(roles, policy_path, tmp_path):
    cfg = config(policy_path, tmp_path, ray__start_timeout_seconds=3)
    worker = LearnerWorker.options(num_cpus=0, name="lonely").remote()
    place, address = ray.get([worker.place.remote(), worker.address.remote()])
    with pytest.raises(RoleFailed, match=r"meeting: lonely raised Dist\w+: "):
        gather([(place, worker.join.remote(0, 2, address, cfg))], ("x", 60.0), "meeting")
    ray.kill(worker)


def test_bad_input_found_by_an_actor_stays_bad_input(roles, policy_path, tmp_path):
    with pytest.raises(FileNotFoundError, match="not_there"):
        roles.begin_evaluation(config(policy_path, tmp_path), str(tmp_path / "not_there"))


def start(cfg_path, *more):
    command = [sys.executable, "-c", "from plumbline.cli import main; main()", "train", str(cfg_path), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_driver_leaves_a_run_that_goes_on(straight, policy_path, tmp_path, fault):
    """The processes that it started go with it, and what it had written after its checkpoint is not counted twice."""
    settings = tree(policy_path, tmp_path / "run", steps=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    driver = start(tmp_path / "run.yaml")
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "completions" / "step-000002.jsonl").exists():
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(started, timeout=90)
    assert not alive, alive
    again = start(tmp_path / "run.yaml", "--resume")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    cfg = parse_config(settings)

    class Result:
        policy = cfg.folder / "checkpoints" / "step-000003" / "policy"

    same(straight, cfg, Result)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_one_line(policy_path, tmp_path):
    """A head node whose control process stands still. Ray's own attempts block for some 40 seconds each."""
    scratch, port = Path("/tmp") / f"plumbline-halted-{os.getpid()}", free_port()
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        Path(sys.executable).parent / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=1",
        "--include-dashboard=false",
    ]
    command += [f"--port={port}", f"--temp-dir={scratch}"]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        control = []
        while not control:
            assert time.monotonic() < deadline
            time.sleep(1)
            children = psutil.Process(head.pid).children(recursive=True)
            control = [child for child in children if "gcs_server" in child.name()]
        control[0].suspend()
        settings = tree(policy_path, tmp_path / "run")
        settings["ray"] = {"address": f"127.0.0.1:{port}", "start_timeout_seconds": 5}
        settings["reward"] = {"shaping": "binary"}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        run = start(tmp_path / "run.yaml")
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 1
        assert (
            f"plumbline: the Ray cluster at 127.0.0.1:{port} did not answer within ray.start_timeout_seconds = 5 s"
            in said
        )
        assert "Traceback" not in said
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)
