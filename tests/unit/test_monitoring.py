"""The shipped alerts and dashboard name only metrics that a gateway exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import yaml

from actors.engine.requests import Request, RequestOutput
from cluster.backend import ControllerStatus
from cluster.telemetry import GatewayMetrics

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
METRIC = re.compile(r"\bmotley_[a-z0-9_]+")
SELECTOR = re.compile(r"\b(motley_[a-z0-9_]+)\{([^}]*)\}")
GROUPED = re.compile(r"\bby \(([^)]*)\)")
ADDED_LABELS = {"instance", "job", "le"}
"""By Prometheus, and to a histogram's buckets."""


def alert_expressions() -> dict[str, str]:
    tree = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))
    return {rule["alert"]: rule["expr"] for group in tree["groups"] for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "grafana.json").read_text(encoding="utf-8")))


def panel_expressions() -> dict[str, str]:
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    }


EXPRESSIONS = alert_expressions() | panel_expressions()


@pytest_asyncio.fixture
async def exported(backend: FakeBackend) -> dict[str, set[str]]:
    """The labels of every sample of a gateway that has served, with a controller."""
    metrics = GatewayMetrics()
    timer = metrics.track(Request(id="a", prompt=(1,)), lambda: 0.0)
    timer.saw(RequestOutput(id="a", tokens=(1,)))
    timer.ended("completed")
    controller = ControllerStatus(phase="steady", epoch=1, moves={"kept": 1})
    status = replace(await backend.status(), controller=controller)
    metrics.render(status, backend.model_info())
    return {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
    }


@pytest.mark.parametrize("title", EXPRESSIONS)
def test_an_expression_names_exported_metrics_and_labels(
    title: str, exported: dict[str, set[str]]
) -> None:
    expression = EXPRESSIONS[title]
    names = METRIC.findall(expression)

    assert set(names) <= set(exported)
    assert names or expression.startswith("up{")
    known = set().union(*(exported[name] for name in names)) | ADDED_LABELS
    for group in GROUPED.findall(expression):
        assert {label.strip() for label in group.split(",")} <= known
    for name, matchers in SELECTOR.findall(expression):
        used = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
        assert used <= exported[name] | ADDED_LABELS


def test_every_exported_family_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    shown = " ".join(panel_expressions().values())
    # A histogram's sum and count say nothing that its buckets do not; _created is when.
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported}

    assert {name for name in families if name not in shown} == set()


def test_the_dashboard_is_whole_and_needs_no_data_source_of_ours() -> None:
    tree = dashboard()
    panels = tree["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [v["name"] for v in tree["templating"]["list"]] == ["datasource", "instance"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]


def test_the_scrape_uses_tls_and_a_token_from_a_file() -> None:
    tree = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
    [job] = tree["scrape_configs"]

    assert job["scheme"] == "https"
    assert job["authorization"] == {"type": "Bearer", "credentials_file": "motley.token"}
    assert job["tls_config"]["ca_file"]
    assert not job["tls_config"].get("insecure_skip_verify")
    assert tree["rule_files"] == ["alerts.yaml"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_promtool_accepts_rules_and_scrape(tmp_path: Path) -> None:
    for name in ("alerts.yaml", "prometheus.yaml"):
        shutil.copy(MONITORING / name, tmp_path)
    for name in ("motley.token", "motley-ca.pem"):
        (tmp_path / name).touch()

    ran = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yaml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stdout + ran.stderr
