"""Connecting to a Ray cluster, or starting a local one, within a deadline."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants
from ray.job_config import JobConfig

from plumbline.rl.config import RunConfig
from plumbline.rl.faults import DeadlinePassed, RoleFailed, first_line
from plumbline.rl.monitoring.job import job_metadata, show_on_job_page

# Ray retries much of what fails; an alarm that one of its retries swallowed rings again.
RING_AGAIN_SECONDS = 5.0
# An alarm cannot interrupt Ray's own library, whose attempts to reach a cluster block for about 40 seconds each. Whoever
# waits for this process must not wait for ever, so it ends when the alarm has gone unheard for so long.
LAST_RESORT_SECONDS = 120.0
# What Ray gives a node to come up.
RAYLET_SECONDS = 30.0


def start_ray(config: RunConfig) -> bool:
    """Connect to the job's or the given cluster, else start a local one. Returns whether we started it.

    Raises DeadlinePassed after ray.start_timeout_seconds.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray lowers its workers' priority by 15; here the workers are the work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # On a busy machine Ray's own helpers come up slowly, and a node ends itself when they do not within half a minute.
    os.environ.setdefault("RAY_agent_register_timeout_ms", str(int(config.ray.start_timeout_seconds * 1000)))
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    metadata = job_metadata(config.name, config.folder)
    common: dict[str, Any] = {
        "job_config": JobConfig(metadata=metadata),
        "log_to_driver": True,
        "logging_level": logging.WARNING,
    }
    seconds = config.ray.start_timeout_seconds
    if address:
        with alarm(seconds, f"the Ray cluster at {address} did not answer"):
            try:
                ray.init(address=address, **common)
            except (ConnectionError, RuntimeError) as error:
                raise RoleFailed(f"the Ray cluster at {address} cannot be reached: {first_line(error)}") from error
            trouble = show_on_job_page(metadata)
        if trouble:
            logging.getLogger(__name__).warning(trouble)
        return True
    # Whoever can reach a Ray cluster can run code in it. Ray asks for the token in ~/.ray/auth_token unless RAY_AUTH_MODE
    # says otherwise, which is left to the user.
    local: dict[str, Any] = {"num_cpus": max(os.cpu_count() or 1, _booked_cpus(config)), "dashboard_host": "127.0.0.1"}
    with on_loopback(), alarm(seconds, "a local Ray cluster did not come up"):
        _start_local(time.monotonic() + seconds, include_dashboard=config.ray.dashboard, **local, **common)
    return True


def _start_local(deadline: float, **settings: Any) -> None:
    """Start a local cluster, once more if it did not come up and there is time.

    Ray gives its own processes 30 seconds whatever the machine is busy with, and then raises a plain Exception.
    """
    while True:
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:
            ray.shutdown()
            if time.monotonic() > deadline - RAYLET_SECONDS:
                raise RoleFailed(f"Ray did not start: {first_line(error)}") from error
            logging.getLogger(__name__).warning("Ray did not start, trying again: %s", first_line(error))


class _Rung(BaseException):
    """Not an Exception, so that no `except Exception` on the way takes it for a failed attempt."""


@contextmanager
def alarm(seconds: float, what: str) -> Iterator[None]:
    """Raise DeadlinePassed("{what} within ray.start_timeout_seconds…") when the block takes longer.

    Signals reach the main thread only; elsewhere nothing but the last resort, ending the process, is left.
    """
    message = f"{what} within ray.start_timeout_seconds = {seconds:g} s"
    last_resort = threading.Timer(seconds + LAST_RESORT_SECONDS, _end_process, [message])
    last_resort.daemon = True
    last_resort.start()
    main = threading.current_thread() is threading.main_thread()

    def ring(*_: object) -> None:
        raise _Rung

    before = signal.signal(signal.SIGALRM, ring) if main else None
    if main:
        signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN_SECONDS)
    try:
        yield
    except _Rung:
        raise DeadlinePassed(message) from None
    finally:
        last_resort.cancel()
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _end_process(message: str) -> None:
    print(f"plumbline: {message}; Ray hangs in a call that cannot be interrupted", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Within the block, a cluster that is started listens on the loopback address alone.

    Ray does so by itself on systems where it forms no clusters of several machines; elsewhere it binds to every
    interface, and takes an address of 127.0.0.1 for the machine's outer one.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _booked_cpus(config: RunConfig) -> int:
    """A local cluster offers at least what the roles book: they take turns, so booking more than the cores is fine."""
    booked = (
        config.rollout.workers * config.rollout.cpus_per_worker
        + config.reward.workers * config.reward.cpus_per_worker
        + config.learner.workers * config.learner.cpus
    )
    return int(-(-booked // 1))
