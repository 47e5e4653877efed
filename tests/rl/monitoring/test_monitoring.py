"""A real run as Prometheus, the dashboard and the job page see it: every documented metric, the names, the timeline."""

import json
import math
import os
import time
import urllib.error
import urllib.request

import psutil
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.files import read_rows
from plumbline.rl.loop import train
from plumbline.rl.monitoring.catalogue import BY_NAME, METRICS
from plumbline.rl.tasks import training_tasks
from plumbline.rl.telemetry import read_metrics
from plumbline.rl.text import Codec

SCRAPE_DEADLINE_SECONDS = 120
# Ray's own spelling of its setting.
REPORT_INTERVAL = "RAY_metrics_report_interval_ms"
SAMPLER = "selection.sampler.name="
EXPECTED = [metric for metric in METRICS if metric.when != "a GPU" and not metric.when.startswith(SAMPLER)]
OF_SAMPLERS = [metric for metric in METRICS if metric.when.startswith(SAMPLER)]
SAMPLERS = sorted({metric.when.removeprefix(SAMPLER) for metric in OF_SAMPLERS})


def scrape():
    """Every sample that the node exports, as (name, labels, value)."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as response:
        text = response.read().decode()
    return [(s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples]


def watch(wanted, run, step):
    """What is exported, once all the wanted metrics are, of the run's last step, or the deadline has passed.

    Ray exports a gauge once after it is set, each process at its own time, so what was seen before is kept; an export
    may fall between two gauges of one step, so there are a few more looks after the step's own.
    """
    deadline = time.monotonic() + SCRAPE_DEADLINE_SECONDS
    seen = {}
    more = 4
    while more and time.monotonic() < deadline:
        seen |= {(name, tuple(sorted(labels.items()))): value for name, labels, value in scrape()}
        samples = [(name, dict(labels), value) for (name, labels), value in seen.items()]
        steps = [value for labels, value in samples_of(BY_NAME["plumbline_step"], samples) if labels["run"] == run]
        more -= steps == [step] and all(samples_of(metric, samples) for metric in wanted)
        time.sleep(1)
    return samples


def status_without_token():
    """HTTP status of the dashboard's list of jobs for a stranger."""
    url = f"http://{ray._private.worker.global_worker.node.webui_url}/api/jobs/"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def samples_of(metric, samples):
    name = metric.exported + ("_count" if metric.kind == "histogram" else "")
    return [(labels, value) for found, labels, value in samples if found == name]


@pytest.fixture(scope="module")
def run(policy_path, tmp_path_factory):
    """Three steps of training with everything on; (config, samples, facts about the cluster)."""
    folder = tmp_path_factory.mktemp("monitored")
    settings = {
        "name": "watched",
        "output": str(folder),
        "steps": 3,
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 10},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 6},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 64, "threads": 1},
        "reward": {"shaping": "plumbline.testing:short_is_good"},
        "algorithm": {"kl_coefficient": 0.01},
        "checkpoint": {"every_steps": 0},
        "evaluation": {"source": "procedural:heldout", "limit": 2, "every_steps": 1},
        "ray": {"timeline_step": 2},
    }
    config = parse_config(settings)
    os.environ[REPORT_INTERVAL] = "500"
    try:
        with Roles.start(config) as roles:
            tasks, _ = training_tasks(config, Codec(config.policy.path))
            train(config, roles, tasks, Console(quiet=True))
            samples = watch(EXPECTED, "watched", 3)
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            listening = set()
            for process in processes:
                try:
                    connections = process.net_connections(kind="inet")
                except psutil.Error:
                    continue  # it ended meanwhile
                listening |= {(process.name(), c.laddr.ip) for c in connections if c.status == psutil.CONN_LISTEN}
            from ray.util.state import list_actors, list_jobs

            context = ray.get_runtime_context()
            mine, where = [("job_id", "=", context.get_job_id())], context.gcs_address
            facts = {
                "listening": listening,
                "actors": sorted(actor.name for actor in list_actors(filters=mine, address=where)),
                "metadata": [job.metadata for job in list_jobs(address=where, detail=True)],
                "unauthorised": status_without_token(),
            }
            facts["samplers"] = []
            for name in SAMPLERS:
                another = parse_config(
                    settings
                    | {"name": f"watched-{name}", "output": str(folder / name), "steps": 1}
                    | {"selection": {"sampler": {"name": name, "screening": 2}}}
                )
                another.folder.mkdir()
                train(another, roles, tasks, Console(quiet=True))
                facts["samplers"] += watch([m for m in OF_SAMPLERS if m.when == SAMPLER + name], another.name, 1)
        yield config, samples, facts
    finally:
        del os.environ[REPORT_INTERVAL]


@pytest.mark.parametrize("metric", EXPECTED, ids=lambda metric: metric.name)
def test_every_documented_metric_is_scraped_with_a_sane_value(run, metric):
    _, samples, _ = run
    found = samples_of(metric, samples)
    assert found, f"{metric.exported} is not exported"
    owner = "run" if metric.role == "driver" else "actor"
    for labels, value in found:
        assert math.isfinite(value)
        assert metric.low <= value <= metric.high
        assert set(metric.tags) <= set(labels)
        assert labels[owner] == "watched" if owner == "run" else labels[owner].startswith(metric.role)


@pytest.mark.parametrize("metric", OF_SAMPLERS, ids=lambda metric: metric.name)
def test_what_a_sampler_tells_is_scraped_from_a_run_with_it(run, metric):
    config, _, facts = run
    name = metric.when.removeprefix(SAMPLER)
    ((labels, value),) = samples_of(metric, facts["samplers"])
    assert labels["run"] == f"watched-{name}"
    assert metric.low <= value <= metric.high
    assert value == pytest.approx(read_metrics(config.folder / name)[-1][metric.key], rel=1e-6)


def test_the_gauges_are_the_last_row_of_the_metrics_file(run):
    config, samples, _ = run
    row = read_metrics(config.folder)[-1]
    for metric in EXPECTED:
        if metric.key:
            ((_, value),) = samples_of(metric, samples)
            assert value == pytest.approx(row[metric.key], rel=1e-6, abs=1e-12), metric.name


def test_the_counters_count_everything(run):
    config, samples, _ = run
    rows = read_metrics(config.folder)
    by_name = {metric.name: sum(value for _, value in samples_of(metric, samples)) for metric in EXPECTED}
    # At the start and after each of three steps, two held-out problems.
    held_out = [row for path in (config.folder / "evaluation").glob("*.jsonl") for row in read_rows(path)]
    assert len(held_out) == 4 * 2
    assert by_name["plumbline_generated_completions"] == 3 * 12 + 4 * 2
    assert by_name["plumbline_graded_completions"] == 3 * 12 + 4 * 2
    assert by_name["plumbline_generated_tokens"] == pytest.approx(
        12 * sum(r["rollout/completion_tokens"] for r in rows) + sum(row["tokens"] for row in held_out)
    )
    assert by_name["plumbline_grading_seconds"] == 3 * 4 + 4 * 2
    assert by_name["plumbline_learner_update_seconds"] == 3


def test_actors_are_named_by_role_and_the_job_by_its_run(run):
    config, _, facts = run
    assert [name.partition(".")[0] for name in facts["actors"]] == ["learner-0", "reward-0", "rollout-0"]
    wanted = {"plumbline_run": "watched", "plumbline_folder": str(config.folder.resolve())}
    assert any(wanted.items() <= (metadata or {}).items() for metadata in facts["metadata"])


def test_nothing_listens_beyond_loopback_and_a_token_is_asked_for(run):
    *_, facts = run
    assert facts["listening"]
    assert {ip for _, ip in facts["listening"]} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, facts["listening"]
    assert facts["unauthorised"] == 401


def test_the_timeline_shows_the_roles_of_one_step(run):
    config, *_ = run
    tree = json.loads((config.folder / "timeline-step-000002.json").read_text())
    rows = {event["tid"]: event["args"]["name"] for event in tree["traceEvents"] if event["ph"] == "M"}
    calls = [(rows[event["tid"]].partition("-")[0], event) for event in tree["traceEvents"] if event["ph"] == "X"]
    assert {"driver", "rollout", "reward", "learner"} <= {row for row, _ in calls}
    ((_, step),) = [call for call in calls if call[0] == "driver"]
    assert step["name"] == "step 2"
    updates = [event for row, event in calls if row == "learner" and event["name"].endswith("update")]
    assert len(updates) == 1
    assert step["ts"] - 5000 <= updates[0]["ts"] <= step["ts"] + step["dur"] + 5000


def test_the_files_of_the_run(run):
    config, *_ = run
    assert list((config.folder / "tensorboard").iterdir())
    assert len(read_metrics(config.folder)) == 3
    assert not (config.folder / "trackers.json").exists()
