"""The Grafana dashboard and the Prometheus configuration, made from the catalogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from plumbline.rl.monitoring.catalogue import Metric, panels

DASHBOARD_FILE = Path(__file__).with_name("grafana_dashboard.json")
PROMETHEUS_FILE = Path(__file__).with_name("prometheus.yml")
DISCOVERY = "prom_metrics_service_discovery.json"
RAY_FOLDER = "/tmp/ray"
SCRAPE_SECONDS = 5

# Grafana's unit names; anything else is shown as a plain number.
GRAFANA_UNITS = {"s": "s", "bytes": "bytes", "ratio": "percentunit", "tokens/s": "short"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def queries(metric: Metric) -> list[tuple[str, str]]:
    """(PromQL, legend) of one metric."""
    name = metric.exported
    session = 'SessionName=~"$SessionName"'
    if metric.kind == "counter":
        by = ", ".join(("actor", *metric.tags))
        legend = " ".join(f"{{{{{label}}}}}" for label in ("actor", *metric.tags))
        return [(f"sum by ({by}) (rate({name}{{{session}}}[1m]))", f"{legend} {metric.unit}/s {_short(metric)}")]
    if metric.kind == "histogram":
        return [
            (
                f"histogram_quantile({quantile}, sum by (le) (rate({name}_bucket{{{session}}}[5m])))",
                f"{_short(metric)} {label}",
            )
            for quantile, label in ((0.5, "median"), (0.95, "p95"))
        ]
    if metric.role == "driver":
        return [(f'{name}{{{session}, run=~"$run"}}', f"{{{{run}}}} {_short(metric)}")]
    return [(f"{name}{{{session}}}", f"{{{{actor}}}} {_short(metric)}")]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's import takes it: one panel for each title of the catalogue."""
    drawn = []
    for number, (title, metrics) in enumerate(panels().items()):
        targets = [
            {"refId": f"q{place}", "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for place, (query, legend) in enumerate(pair for metric in metrics for pair in queries(metric))
        ]
        units = {GRAFANA_UNITS.get(metric.unit, "short") for metric in metrics}
        drawn.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "description": "\n".join(f"{_short(metric)} ({metric.unit}): {metric.about}" for metric in metrics),
                "datasource": SOURCE,
                "gridPos": {
                    "x": WIDTH * (number % COLUMNS),
                    "y": HEIGHT * (number // COLUMNS),
                    "w": WIDTH,
                    "h": HEIGHT,
                },
                "targets": targets,
                "fieldConfig": {
                    # A histogram has no quantiles while nothing is observed: lines go on to the next point.
                    "defaults": {
                        "unit": units.pop() if len(units) == 1 else "short",
                        "custom": {"spanNulls": True, "showPoints": "auto"},
                    },
                    "overrides": [],
                },
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
            }
        )
    return {
        "uid": "plumbline-training",
        "title": "plumbline",
        "tags": ["plumbline", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                _variable("SessionName", "label_values(ray_plumbline_step, SessionName)"),
                _variable("run", 'label_values(ray_plumbline_step{SessionName=~"$SessionName"}, run)'),
            ]
        },
        "panels": drawn,
    }


def prometheus(ray_folder: str = RAY_FOLDER) -> str:
    """A Prometheus configuration that finds every node of the cluster whose head node uses this temporary folder."""
    # The file comes with the cluster and goes with it; Prometheus looks again only every five minutes if not told.
    discovery = {"files": [f"{ray_folder.rstrip('/')}/{DISCOVERY}"], "refresh_interval": f"{SCRAPE_SECONDS}s"}
    tree = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [discovery]}],
    }
    return yaml.safe_dump(tree, sort_keys=False)


def write(folder: Path, ray_folder: str = RAY_FOLDER) -> list[Path]:
    """Write both files into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / DASHBOARD_FILE.name, folder / PROMETHEUS_FILE.name]
    made[0].write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    made[1].write_text(prometheus(ray_folder), encoding="utf-8")
    return made


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _short(metric: Metric) -> str:
    return metric.name.removeprefix("plumbline_")
