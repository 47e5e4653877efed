"""`ray job submit -- plumbline run …`: the whole pipeline as a job, stopped in the middle and resumed by another."""

import json
import subprocess
import time

import pytest

from plumbline.rl.telemetry import read_metrics

pytestmark = pytest.mark.slow

TINY = ["data.limit=8", "rollout.prompts_per_step=4", "rollout.completions_per_prompt=2", "rollout.max_new_tokens=16"]
TINY += ["selection.prerun_steps=4", "selection.threshold=null", "selection.count=4", "evaluation.limit=8"]
# Short answers earn more: curves that differ, though the policy has no room to answer.
TINY += ["reward.shaping=plumbline.testing:short_is_good", "learner.threads=1", "checkpoint.every_steps=1"]
SECONDS = 1200


def ray_job(cluster, checkout, verb, *rest):
    return subprocess.run(
        ["ray", "job", verb, *rest], cwd=checkout, env=cluster, capture_output=True, text=True, timeout=SECONDS
    )


def status(cluster, checkout, name):
    return ray_job(cluster, checkout, "status", name).stdout


def test_a_stopped_pipeline_goes_on_where_it_was(cluster, checkout, tmp_path):
    run = tmp_path / "run"
    command = ["plumbline", "run", "configs/quickstart.yaml", *TINY, f"output={run}"]
    names = ["--no-wait", "--submission-id=pipeline", "--working-dir", "."]
    begun = ray_job(cluster, checkout, "submit", *names, "--", *command, "steps=100000")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    began = asked = time.monotonic()
    # Soon after the arm's first step: whatever it has done by then, the second job has to do twice more.
    while not read_metrics(run / "full"):
        if time.monotonic() > asked + 20:
            asked = time.monotonic()
            gone = "failed" in status(cluster, checkout, "pipeline") or asked > began + SECONDS
            assert not gone, ray_job(cluster, checkout, "logs", "pipeline").stdout
        time.sleep(0.2)
    stopped = ray_job(cluster, checkout, "stop", "pipeline")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "'pipeline' was stopped" in status(cluster, checkout, "pipeline")
    assert not (run / "summary.json").exists()
    done = max(int(path.name.rpartition("-")[2]) for path in (run / "full" / "checkpoints").glob("step-*"))
    finished = [run / "prerun" / "metrics.jsonl", run / "prerun" / "result.json", run / "evaluation" / "base.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in finished}
    kept = (run / "selection" / "lim_ids.txt").read_text()

    result = ray_job(cluster, checkout, "submit", "--working-dir", ".", "--", *command, f"steps={done + 1}", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "prerun: finished before, 4 steps" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert (run / "selection" / "lim_ids.txt").read_text() == kept
    for arm in ("full", "random", "lim"):
        assert [row["step"] for row in read_metrics(run / arm)] == list(range(1, done + 2))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == {"prerun": 4, **dict.fromkeys(("full", "random", "lim"), done + 1)}
    assert summary["samples"] == {"full": 8, "random": 4, "lim": 4}
    assert {summary[f"{name}_accuracy"]["n"] for name in ("base", "full", "random", "lim")} == {8}
    assert (run / "report.html").is_file()
    versions = json.loads((run / "run.json").read_text())["versions"]
    assert versions["plumbline"].endswith("+submitted")
