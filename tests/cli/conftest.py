"""A head node of the test's own with token authentication on, and a checkout to submit from."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROOMS = ("plumbline", "rl", "models", "kernels", "rewards", "selection", "configs", "pyproject.toml")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment that reaches a head node of its own; the node goes with the test."""
    # Ray's socket names must stay short.
    scratch = Path("/tmp") / f"plumbline-job-{os.getpid()}"
    scratch.mkdir()
    home = tmp_path_factory.mktemp("home")
    dashboard, agent = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "HOME": str(home)}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", "--include-dashboard=true"]
    # On the loopback address alone, and beside whatever other cluster runs on this machine.
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
    command += [f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--temp-dir={scratch}"]
    with (scratch / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            # Jobs are taken by the dashboard and started by the agent.
            if answers(dashboard) and answers(agent):
                break
            assert head.poll() is None, (scratch / "head.log").read_text()
            assert time.monotonic() < deadline, (scratch / "head.log").read_text()
            time.sleep(0.5)
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)
        for process in (psutil.Process(head.pid), *processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository that says so in its version: what runs must be what was submitted."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ROOMS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    version = folder / "plumbline" / "__init__.py"
    version.write_text(version.read_text() + '\n__version__ += "+submitted"\n')
    return folder
