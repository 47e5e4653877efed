"""`ray job submit --working-dir . -- plumbline train …` against a real head node, with token authentication on."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def submit(cluster, checkout, *command):
    call = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *command]
    return subprocess.run(call, cwd=checkout, env=cluster, capture_output=True, text=True, timeout=400)


def test_a_submitted_job_trains_with_the_submitted_code(cluster, checkout, tmp_path):
    small = ["steps=1", "data.limit=4", "rollout.prompts_per_step=4", "rollout.completions_per_prompt=2"]
    small += ["rollout.max_new_tokens=8", "learner.threads=1"]
    result = submit(
        cluster, checkout, "plumbline", "train", "configs/quickstart.yaml", *small, f"output={tmp_path}/run"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 1/1" in result.stdout
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["versions"]["plumbline"].endswith("+submitted")
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "policy" / "model.safetensors").is_file()


def test_bad_input_fails_the_job_with_its_line(cluster, checkout):
    result = submit(cluster, checkout, "plumbline", "train", "configs/quickstart.yaml", "steps.x=1")
    assert result.returncode != 0
    assert "plumbline: " in result.stdout + result.stderr


def test_the_cluster_refuses_a_client_without_the_token(cluster, checkout):
    stranger = {key: value for key, value in cluster.items() if key != "RAY_AUTH_TOKEN"} | {"RAY_AUTH_MODE": "disabled"}
    result = submit(stranger, checkout, "plumbline", "--version")
    assert result.returncode != 0
    assert "uthentication" in result.stdout + result.stderr


SMALL = ["data.limit=4", "rollout.prompts_per_step=4", "rollout.completions_per_prompt=2", "rollout.max_new_tokens=8"]
SMALL += ["learner.threads=1"]


def newest_step(run):
    return max((int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("step-*")), default=0)


def wait_for_step(cluster, name, run, step, seconds=400):
    """Until the job's newest checkpoint is of that step; a job that ends before it, or takes longer, shows its log."""
    deadline = time.monotonic() + seconds
    while newest_step(run) < step:
        status = job_page(cluster, name)["status"]
        if status not in ("PENDING", "RUNNING") or time.monotonic() > deadline:
            log = subprocess.run([BIN / "ray", "job", "logs", name], env=cluster, capture_output=True, text=True)
            pytest.fail(
                f"job {name} is {status}, its newest checkpoint of step {newest_step(run)}\n{log.stdout}{log.stderr}"
            )
        time.sleep(0.5)


def job_page(cluster, name):
    """What the dashboard's job page is made of."""
    request = urllib.request.Request(
        f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/{name}",
        headers={"Authorization": f"Bearer {cluster['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_a_stopped_job_goes_on_and_its_history_can_be_selected_from(cluster, checkout, tmp_path):
    command = ["plumbline", "train", "configs/quickstart.yaml", *SMALL, "steps=100000", "checkpoint.every_steps=1"]
    command.append(f"output={tmp_path}/run")
    call = [BIN / "ray", "job", "submit", "--no-wait", "--submission-id=stopped", "--working-dir", "."]
    subprocess.run([*call, "--", *command], cwd=checkout, env=cluster, check=True, capture_output=True, timeout=200)
    wait_for_step(cluster, "stopped", tmp_path / "run", 2)
    page = job_page(cluster, "stopped")
    assert page["status"] == "RUNNING"
    assert page["metadata"]["plumbline_run"] == "quickstart"
    assert page["metadata"]["plumbline_folder"] == str(tmp_path / "run")
    stop = [BIN / "ray", "job", "stop", "stopped"]
    subprocess.run(stop, env=cluster, check=True, capture_output=True, timeout=200)
    assert job_page(cluster, "stopped")["status"] == "STOPPED"
    done = newest_step(tmp_path / "run")

    command[command.index("steps=100000")] = f"steps={done + 1}"
    result = submit(cluster, checkout, *command, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, done + 2))
    # The log is for people: plain lines, the last of which says what was done.
    assert "\r" not in result.stdout
    assert f"step {done + 1}/{done + 1}" in result.stdout
    assert "done: " in result.stdout

    chosen = tmp_path / "chosen"
    choose = ["plumbline", "select", "random", f"--history={tmp_path}/run", "--count=2", f"--output={chosen}"]
    result = submit(cluster, checkout, *choose)
    assert result.returncode == 0, result.stdout + result.stderr
    assert chosen.is_dir()


def test_an_evaluation_as_a_job(cluster, checkout, tmp_path):
    command = ["plumbline", "evaluate", "embedded", "--benchmarks=procedural:heldout", "--limit=4", "--device=cpu"]
    command += ["--max-new-tokens=8", f"--output={tmp_path}/answers"]
    result = submit(cluster, checkout, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4/4 problems" in result.stdout
    manifest = json.loads((tmp_path / "answers" / "manifest.json").read_text())
    assert manifest["results"]["procedural-heldout"]["accuracy"]["n"] == 4
