"""The Grafana dashboard is what its generator writes, and asks for what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "ddpm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def queries() -> Iterator[tuple[str, str]]:
    """(title of the panel, PromQL) of every query."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_the_file_is_what_the_generator_writes(tmp_path):
    out = tmp_path / "ddpm.json"
    subprocess.run([sys.executable, GRAFANA / "dashboard.py", out], check=True, timeout=60)
    assert out.read_text() == (GRAFANA / "dashboards" / "ddpm.json").read_text(), (
        "run `python docker/grafana/dashboard.py`"
    )


def test_there_is_a_row_for_each_thing_to_look_at():
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Overview", "Requests", "Queue and slots", "Device", "Streams", "Process"]


def test_every_panel_has_a_title_a_description_a_query_and_a_unit():
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["targets"]
        if panel["type"] == "heatmap":
            assert panel["options"]["yAxis"]["unit"]
        elif panel["title"] != "Model":
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_no_two_panels_have_the_same_place_or_number():
    cells = Counter(
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    )
    assert set(cells.values()) == {1}
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


LABELS = {
    family.name + ("_total" if family.type == "counter" else ""): set(instrument._labelnames)
    for instrument in vars(Telemetry()).values()
    if hasattr(instrument, "_labelnames")
    for family in instrument.collect()
}
"""The labels of every metric of ours."""


@pytest.mark.parametrize(("title", "expr"), [*queries()])
def test_a_query_asks_for_metrics_and_labels_that_exist(title, expr):
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bddpm_\w+", expr)}
    assert names - LABELS.keys() == set()
    known = {"instance", "le", "alertname", "alertstate"}.union(*(LABELS[name] for name in names))
    grouped = {name for group in re.findall(r"by \(([^)]+)\)", expr) for name in group.split(", ")}
    matched = {name for group in re.findall(r"\{([^}]*)\}", expr) for name in re.findall(r"(\w+)[=!]", group)}
    assert (grouped | matched) - known == set()
    assert "instance" in matched
    assert set(re.findall(r"\$(\w+)", expr)) - VARIABLES == set()


def test_every_metric_is_on_the_dashboard():
    text = " ".join(expr for _, expr in queries())
    assert {name for name in LABELS if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", text)} == set()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_legend_names_labels_that_its_query_leaves(panel):
    for target in panel["targets"]:
        left = {name for group in re.findall(r"by \(([^)]+)\)", target["expr"]) for name in group.split(", ")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - left == set()


# ── Provisioning ───────────────────────────────────────────────────────────────────────────────


def provisioned(file: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((GRAFANA / "provisioning" / file).read_text())
    return found


def test_the_data_source_knows_how_often_prometheus_scrapes():
    (source,) = provisioned("datasources/prometheus.yml")["datasources"]
    prometheus = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)


def test_dashboards_come_from_a_folder():
    (provider,) = provisioned("dashboards/ddpm.yml")["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
