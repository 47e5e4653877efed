"""Every query of the dashboard is asked, first of a stand-in that knows nothing of PromQL, then of a real Prometheus."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
from rich.console import Console
from typer.testing import CliRunner

from plumbline.cli import app
from plumbline.errors import InputError
from plumbline.rl.cluster import Roles
from plumbline.rl.config import parse_config
from plumbline.rl.loop import train
from plumbline.rl.monitoring import dashboard
from plumbline.rl.monitoring.catalogue import METRICS
from plumbline.rl.monitoring.check_dashboard import ask_every_query
from plumbline.rl.tasks import training_tasks
from plumbline.rl.text import Codec


@pytest.fixture
def server():
    """(URL, queries asked, names that have no data, names that are refused) of a stand-in for Prometheus."""
    asked, empty, refused = [], set(), set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            (query,) = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)["query"]
            asked.append(query)
            values = [] if any(name in query for name in empty) else [[0, "1.5"], [1, "NaN"], [2, "2"]]
            answer = {"status": "success", "data": {"result": [{"metric": {}, "values": values}]}}
            self.send_response(400 if any(name in query for name in refused) else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked, empty, refused
        listening.shutdown()


def test_every_query_of_the_dashboard_is_asked_with_all_chosen(server):
    url, asked, *_ = server
    answers = ask_every_query(url)
    tree = json.loads(dashboard.DASHBOARD_FILE.read_text())
    drawn = [target["expr"] for panel in tree["panels"] for target in panel["targets"]]
    assert asked == [expr.replace("$SessionName", ".*").replace("$run", ".*") for expr in drawn]
    assert {answer.metric for answer in answers} == set(METRICS)
    assert {answer.points for answer in answers} == {2}


def test_what_every_run_has_must_have_data(server):
    url, _, empty, refused = server
    empty |= {"ray_plumbline_gpu_memory_bytes"}
    result = CliRunner().invoke(app, ["monitoring", "--check", url])
    assert result.exit_code == 0
    assert "(only with a GPU)" in result.output
    empty |= {"ray_plumbline_loss"}
    result = CliRunner().invoke(app, ["monitoring", "--check", url])
    assert result.exit_code == 1
    assert result.output.rstrip().endswith(", 1 missing")
    refused |= {"ray_plumbline_entropy"}
    with pytest.raises(InputError, match="Prometheus refuses ray_plumbline_entropy_nats"):
        ask_every_query(url)


def test_no_prometheus_is_said_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="no Prometheus answers"):
            ask_every_query(f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(InputError, match="wants Prometheus' address"):
        ask_every_query("127.0.0.1:9090")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_every_panel_draws_a_run_in_prometheus(policy_path, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    settings = {
        "name": "drawn",
        "output": str(tmp_path / "run"),
        "policy": {"path": policy_path, "device": "cpu"},
        "data": {"source": "procedural:train", "limit": 10},
        "rollout": {"prompts_per_step": 4, "completions_per_prompt": 3, "max_new_tokens": 6, "slots": 6},
        "learner": {"learning_rate": 1e-2, "tokens_per_microbatch": 64, "threads": 1},
        "algorithm": {"kl_coefficient": 0.01},
        "checkpoint": {"every_steps": 0},
        "evaluation": {"source": "procedural:heldout", "limit": 2, "every_steps": 5},
    }
    config = parse_config(settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with Roles.start(config) as roles:
        # The cluster's own copy: a machine's clusters share the one in Ray's temporary folder.
        session = ray._private.worker.global_worker.node.get_session_dir_path()
        (tmp_path / "prometheus.yml").write_text(dashboard.prometheus(session))
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--web.listen-address={address}"]
        with (tmp_path / "prometheus.log").open("w") as log:
            watching = subprocess.Popen(
                [*command, f"--storage.tsdb.path={tmp_path}/data"], stdout=log, stderr=subprocess.STDOUT
            )
        try:
            tasks, _ = training_tasks(config, Codec(config.policy.path))
            deadline = time.monotonic() + 300
            number = 0
            while True:
                # Rates need values that grow between two scrapes, five seconds apart.
                number += 1
                again = parse_config(settings | {"output": str(tmp_path / f"run-{number}"), "steps": 20})
                again.folder.mkdir()
                train(again, roles, tasks, Console(quiet=True))
                answers = ask_every_query(f"http://{address}", seconds=600, step=5)
                empty = {answer.metric.name for answer in answers if answer.points == 0}
                allowed = {m.name for m in METRICS if m.when == "a GPU" or m.when.startswith("selection.sampler")}
                if empty <= allowed or time.monotonic() > deadline:
                    break
            assert empty <= allowed
        finally:
            watching.kill()
            watching.wait()
