"""docs/monitoring.md, the dashboard and the alerts name what the code has, and all of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter, Histogram

from fedge import logs
from fedge_client.agent import figures
from fedge_server.monitoring import metrics
from fedge_server.rounds.record import HOSTILE, KINDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
DASHBOARD = json.loads((ROOT / "server" / "grafana" / "fedge.json").read_text("utf-8"))
ALERTS = ROOT / "server" / "prometheus" / "alerts.yml"
NAME = re.compile(r"\b(?:fedge|process)_[a-z_]+\b")
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}


def defined() -> dict[str, tuple[str, str]]:
    """Type and labels by the name that Prometheus sees."""
    found = {gauge.name: ("gauge", ", ".join(gauge.labels)) for gauge in metrics.LOOKED_UP}
    for metric in metrics.COUNTED:
        (family,) = metric.describe()
        kind = "counter" if isinstance(metric, Counter) else "histogram"
        name = f"{family.name}_total" if kind == "counter" else family.name
        found[name] = kind, ", ".join(metric._labelnames)
    return found


def rows(heading: str) -> list[list[str]]:
    """Cells of the tables under a heading."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (body,) = [part for part in section if part.startswith(heading + "\n")]
    return [
        [cell.strip() for cell in line.strip("|").split(" |")] for line in re.findall(r"^\| `.*$", body, re.M)
    ]


def series() -> set[str]:
    """Names that may stand in an expression."""
    found = set(OF_THE_PROCESS)
    for name, (kind, _) in defined().items():
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def test_the_page_lists_every_metric_of_the_server_with_its_type_and_labels() -> None:
    told = {row[0].strip("`"): (row[1], row[2].replace("`", "")) for row in rows("Metrics of the server")}
    assert told == defined()


def test_the_page_lists_every_metric_of_the_agent() -> None:
    told = {row[0].strip("`"): (row[1], row[2].replace("`", "")) for row in rows("Metrics of a device")}
    assert told == {each.name: (each.kind, ", ".join(each.labels)) for each in figures.FIGURES}


def test_names_are_as_prometheus_wants_them() -> None:
    for name, (kind, labels) in defined().items():
        assert re.fullmatch(r"fedge_[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (kind == "counter"), name
        assert not set(labels.split(", ")) & {"device", "device_id", "node", "peer", "message_id"}, name
    for metric in metrics.COUNTED:
        assert isinstance(metric, Counter | Histogram)
        assert metric._documentation


def test_the_page_lists_every_signal_and_every_kind_of_rejection() -> None:
    told = {row[0].strip("`"): row[1] for row in rows("Signals of security")}
    assert told == {**logs.EVENTS, **KINDS}
    assert set(metrics.HUB_EVENTS) <= set(logs.EVENTS)
    assert set(KINDS) >= HOSTILE


def expressions(panels: list[Any]) -> Iterator[str]:
    for panel in panels:
        yield from (target["expr"] for target in panel.get("targets", ()))
        yield from expressions(panel.get("panels", []))


def test_every_expression_of_the_dashboard_names_metrics_that_exist_and_none_is_left_out() -> None:
    found = list(expressions(DASHBOARD["panels"]))
    named = {name for expression in found for name in NAME.findall(expression)}
    assert all(NAME.search(expression) for expression in found)
    assert named - series() == set()
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in defined() else name for name in named}
    assert set(defined()) - shown == set()


def test_panels_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


def test_every_alert_names_metrics_that_exist() -> None:
    text = "\n".join(line for line in ALERTS.read_text("utf-8").splitlines() if "summary" not in line)
    named = set(re.findall(r"\bfedge_[a-z_]+\b", text))
    assert len(named) > 15
    assert named - series() == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules_and_the_configuration() -> None:
    for command, name in ((("check", "rules"), "alerts.yml"), (("check", "config"), "prometheus.yml")):
        done = subprocess.run(
            ["promtool", *command, name], cwd=ALERTS.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions(DASHBOARD["panels"]))
    ]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
