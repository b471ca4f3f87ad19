"""Scores in whole runs: where they are kept, and that they change nothing."""

from __future__ import annotations

import json

import pytest

from fedge.errors import ConfigError
from fedge_server.cli import main
from fedge_simulations import run
from fedge_simulations.world import prepare

HOSTILE = {
    "clients": {"count": 10},
    "rounds": {"count": 3},
    "scenario": {"attackers": 0.3, "attacks": ["scale:8"]},
}


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("fedmedian", None, True),
        ("fedmedian", False, False),
        ("fedavg", None, False),
        ("fedavg", True, True),
    ],
)
def test_updates_are_scored_where_single_ones_are_seen_or_where_it_is_asked_for(
    name, wanted, expected, small, learn, tmp_path
):
    asked = {} if wanted is None else {"anomalies": wanted}
    sections = {"strategy": {"name": name}, "rounds": {"count": 2}}
    records = learn(small(evaluate=asked, **sections), tmp_path / "asked").records
    assert [len(record.anomalies) for record in records] == ([5, 5] if expected else [0, 0])
    plain = learn(small(evaluate={"anomalies": False}, **sections), tmp_path / "plain").records
    assert records[-1].metrics["accuracy"] == pytest.approx(plain[-1].metrics["accuracy"], abs=0.01)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_scores(small, learn, tmp_path):
    config = small(strategy={"name": "geometricmedian"}, **HOSTILE)
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=1)
    resumed = learn(config, tmp_path / "cut")
    assert [r.anomalies for r in resumed.records] == [r.anomalies for r in whole.records]
    assert any(record.conspicuous for record in whole.records)


@pytest.mark.slow
def test_attackers_stand_in_history_report_and_command(small, tmp_path, capsys):
    config = small(strategy={"name": "centredclipping"}, **HOSTILE)
    result = run(config, tmp_path / "run")
    odd = set(result.history[-1].conspicuous)
    assert odd
    line = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert len(line["anomalies"]) == 10
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Clients that stand out" in report
    assert "Who stands out" in report
    [run_id] = {row["id"] for row in _json(main, ["run", "ls", "--home", str(tmp_path / "run")], capsys)}
    assert main(["run", "show", run_id, "--home", str(tmp_path / "run")]) == 0
    assert "stand out (clients " in capsys.readouterr().out


def test_updates_of_different_models_are_not_held_against_each_other(small):
    rule = {"name": "feddf", "models": "mlp,logistic"}
    with pytest.raises(ConfigError, match=r"feddf.*evaluate\.anomalies is for one architecture"):
        prepare(small(strategy=rule, evaluate={"anomalies": True}))


def _json(command, arguments, capsys):
    assert command([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)
