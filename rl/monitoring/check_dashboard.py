"""Asking a Prometheus server every query of the dashboard, as Grafana would, and saying which ones show nothing."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from plumbline.errors import InputError
from plumbline.rl.monitoring.catalogue import Metric, panels
from plumbline.rl.monitoring.dashboard import queries

TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Answer:
    """What one query of one panel gave.

    Attributes:
        panel: its title.
        metric: that it shows.
        query: as it was sent, with All chosen for the variables.
        series: lines it draws.
        points: finite values on them.
    """

    panel: str
    metric: Metric
    query: str
    series: int
    points: int

    @property
    def missing(self) -> bool:
        """Nothing to draw, of a metric that every run has."""
        return self.points == 0 and not self.metric.when


def ask_every_query(url: str, *, seconds: float = 3600.0, step: float = 15.0) -> list[Answer]:
    """One answer for each query of the dashboard.

    Args:
        url: Prometheus' base URL.
        seconds: the time range, up to now.
        step: between two points.

    Raises:
        InputError: no Prometheus answers there, or it does not understand a query.
    """
    now = time.time()
    answers = []
    for title, metrics in panels().items():
        for metric in metrics:
            for query, _ in queries(metric):
                # Grafana puts the variable's allValue in the place of its name when All is chosen.
                sent = query.replace("$SessionName", ".*").replace("$run", ".*")
                times = {"query": sent, "start": f"{now - seconds}", "end": f"{now}", "step": f"{step}"}
                found = _answer(f"{url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(times)}", sent)
                values = [float(value) for series in found for _, value in series["values"]]
                answers.append(Answer(title, metric, sent, len(found), sum(math.isfinite(value) for value in values)))
    return answers


def _answer(address: str, query: str) -> list[dict[str, Any]]:
    if not address.startswith(("http://", "https://")):
        raise InputError("--check wants Prometheus' address, for example http://127.0.0.1:9090")
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        raise InputError(
            f"Prometheus refuses {query}: HTTP {error.code} {error.read(300).decode(errors='replace')}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"no Prometheus answers at {address.partition('/api')[0]}: {error}") from None
