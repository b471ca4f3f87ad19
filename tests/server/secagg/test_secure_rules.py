"""What goes with secure aggregation: the document's table, tried row by row, and what a report says."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from fedge.config import Config, override
from fedge.errors import ConfigError
from fedge_server import strategies
from fedge_server.privacy.report import privacy_report
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.secure import encoding_of
from fedge_server.secagg.graph import degree_of
from fedge_server.strategies import LINEAR, NAMES, PLAIN

NETWORK = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
PLAINLY = {"privacy": {"secure_aggregation": True}, "model": {"standardise": False}}
PAGE = (Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text("utf-8")


def rows(head: str) -> list[list[str]]:
    """The cells of a table of the document, without its head."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line[0] == head)
    end = next((i for i in range(start + 1, len(lines)) if len(lines[i]) != len(lines[start])), len(lines))
    return lines[start + 1 : end]


@pytest.mark.parametrize(("assignment", "verdict", "why"), rows("with it"))
def test_each_row_of_the_documented_table_is_so(assignment: str, verdict: str, why: str) -> None:
    key, _, value = assignment.strip("`").partition(" = ")
    made = Config.from_mapping(override(PLAINLY, [f"{key}={value}"]))
    if verdict == "allowed":
        strategies.build(made, network=NETWORK)
    else:
        assert verdict == "refused"
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            strategies.build(made, network=NETWORK)


@pytest.mark.parametrize("name", NAMES)
def test_only_strategies_that_average_go_with_sums(name: str) -> None:
    made = Config.from_mapping({**PLAINLY, "strategy": {"name": name}})
    if PLAIN[name] in LINEAR:
        strategies.build(made, network=NETWORK)
    else:
        with pytest.raises(ConfigError, match="looks at single updates"):
            strategies.build(made, network=NETWORK)


@pytest.mark.slow
def test_the_documented_degrees_are_those_of_the_code() -> None:
    for clients, *cells in rows("clients")[:4]:
        for cell, dropouts in zip(cells, (0.1, 0.2, 0.3), strict=True):
            degree = degree_of(int(clients.replace(",", "")), corrupt=0.1, dropouts=dropouts)
            assert cell == f"{degree.neighbours}, {degree.threshold}"


def test_a_sum_that_could_overflow_is_refused_before_the_run() -> None:
    made = Config.from_mapping({"privacy": {"secure_examples": 10**9}})
    with pytest.raises(ConfigError, match=r"privacy\.secure_examples = 1000000000.*lower it"):
        encoding_of(made, 1000)


def test_the_report_says_who_sees_sums_alone_and_what_they_do_not_cover() -> None:
    facts = {"secure_neighbours": 6, "secure_threshold": 5, "secure_cut": 1, "secure_least": 3}
    records = [RoundRecord(0, {}), RoundRecord(1, {}, clients=6, asked=7, privacy=facts)]
    records.append(RoundRecord(2, {}, asked=7, counted=False, privacy={"aborted": "too few"}))
    found = privacy_report(
        Config.from_mapping(PLAINLY), records, epsilon=None, moments=False, simulated=False
    )
    assert not any(viewer.single_updates for viewer in found.viewers)
    assert (found.neighbourhood, found.shares, found.cut, found.aborted, found.threshold) == (7, 5, 1, 1, 3)
    assert "no single one" in found.statements[0]
    assert "No epsilon bounds" in found.statements[1]
    assert not found.protects
    assert found.to_json()["secure_aggregation"] is True
