"""The packaged dashboard and configuration say what the catalogue says, and so does the documentation."""

import json
import re
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from plumbline.rl.monitoring import dashboard
from plumbline.rl.monitoring.catalogue import METRICS, markdown, panels
from plumbline.selection.dynamic_samplers import SAMPLERS

ROOT = Path(__file__).parents[3]


def test_the_packaged_files_are_the_generated_ones(tmp_path):
    for made, packaged in zip(
        dashboard.write(tmp_path), (dashboard.DASHBOARD_FILE, dashboard.PROMETHEUS_FILE), strict=True
    ):
        assert made.read_text() == packaged.read_text(), f"plumbline monitoring {packaged.parent} writes it anew"


def test_every_metric_is_on_the_dashboard_and_nothing_else():
    tree = json.loads(dashboard.DASHBOARD_FILE.read_text())
    queries = " ".join(target["expr"] for panel in tree["panels"] for target in panel["targets"])
    shown = {re.sub(r"_bucket$", "", name) for name in re.findall(r"ray_plumbline_\w+", queries)}
    assert shown == {metric.exported for metric in METRICS}
    assert [panel["title"] for panel in tree["panels"]] == list(panels())
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in tree["panels"]}
    assert len(places) == len(tree["panels"])
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in tree["panels"])


def test_names_follow_prometheus():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"plumbline_[a-z_]+", metric.name)
        assert (metric.unit == "ratio") == metric.name.endswith("_ratio"), metric.name
        if metric.unit in ("s", "bytes"):
            assert metric.name.endswith({"s": "_seconds", "bytes": "_bytes"}[metric.unit])
        assert (metric.kind == "histogram") == bool(metric.bounds)


def test_the_documentation_has_the_table():
    assert markdown() in (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")


def test_prometheus_reads_the_folder_it_is_given():
    tree = yaml.safe_load(dashboard.prometheus("/scratch/ray/"))
    (job,) = tree["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    assert discovery["files"] == ["/scratch/ray/prom_metrics_service_discovery.json"]
    assert discovery["refresh_interval"] == "5s"


@pytest.mark.parametrize("name", SAMPLERS)
def test_whatever_a_sampler_tells_is_in_the_catalogue_under_its_name(name):
    ids = [f"p{i}" for i in range(6)]
    options = {
        "curriculum": {"difficulty": {sample_id: float(i) for i, sample_id in enumerate(ids)}},
        "speed": {"screening": 1, "completions": 4},
    }
    told = {f"selection/{key}" for key in SAMPLERS[name](ids, 0, **options.get(name, {})).metrics()}
    assert told == {metric.key for metric in METRICS if metric.when == f"selection.sampler.name={name}"}


def known(ours, theirs, path=""):
    """Every key and value of ours that is not in theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [found for key in ours for found in known(ours[key], theirs.get(key), f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [found for i in range(len(ours)) for found in known(ours[i], theirs[i], f"{path}/{i}")]
    return [] if ours == theirs else [path]


def test_the_dashboard_is_one_by_grafanas_own_schema():
    register_default_plugins()
    tree = json.loads(dashboard.DASHBOARD_FILE.read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(tree)))))
    # What Grafana's types do not know is lost in reading.
    assert known(tree, read) == []
    tree["panels"][0]["targets"][0]["expression"] = tree["panels"][0]["targets"][0].pop("expr")
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(tree)))))
    assert known(tree, read) == ["/panels/0/targets/0/expression"]
