"""`fedge-server rollout` and `fedge-server audit`, over a home."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge_server.cli import main
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import writing
from fedge_server.rollout.reports import Report
from fedge_server.rollout.service import Rollouts

Run = Callable[..., tuple[int, str, str]]
PLAN = """
[[stages]]
name = "canary"
percent = 25
hold_h = 0
min_installs = 3
[[stages]]
name = "all"
percent = 100
hold_h = 0
min_installs = 30
[criteria.install]
tolerated = 0.02
unacceptable = 0.1
"""
ALL = PLAN[PLAN.index("[[stages]]", 5) :].replace("30", "1")


@pytest.fixture(params=["sqlite"])
def database_url() -> None:
    """These commands do nothing of their own to a database."""


@pytest.fixture
def run(filled: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command on the home; returns the exit code and what it printed."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*words, "--home", str(tmp_path)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def begun(run: Run, filled: Registry, tmp_path: Path, devices: list[str]) -> list[str]:
    """Version 1 has reached all and version 2 is begun; returns its canaries."""
    (tmp_path / "all.toml").write_text(ALL)
    (tmp_path / "plan.toml").write_text(PLAN)
    assert run("rollout", "start", "1", "--plan", str(tmp_path / "all.toml"))[0] == 0
    rollouts = Rollouts(filled)
    rollouts.offer(devices[0])
    rollouts.note(Report(devices[0], 1, "installed"))
    assert run("rollout", "start", "2", "--plan", str(tmp_path / "plan.toml"), "--reason", "round 40")[0] == 0
    return [device for device in devices if rollouts.offer(device, 1) == 2]


def value(run: Run, *words: str) -> Any:
    code, out, _ = run(*words, "--format", "json")
    assert code == 0
    return json.loads(out)


def test_a_start_says_what_each_stage_can_find(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    code, out, _ = run("rollout", "start", "1", "--tier", "micro", "--plan", str(tmp_path / "plan.toml"))
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "micro-1: running, stage canary (1/2)"
    assert lines[1].startswith("  canary: ")
    assert "halts an unacceptable release with install 0." in lines[1]
    assert lines[2].startswith("  all: 40 devices; ")
    assert lines[3] == "  no halt before 3 devices have reported something bad"


def test_the_state_and_its_evidence_can_be_read(run: Run, begun: list[str]) -> None:
    assert [each["status"] for each in value(run, "rollout", "status")] == ["done", "running"]
    one = value(run, "rollout", "status", "micro-2")
    assert (one["id"], one["base"], one["stage"], one["needed"]) == ("micro-2", 1, "canary", 3)
    assert one["evidence"][0]["halts_at"] == pytest.approx(4.605, abs=1e-3)
    code, out, _ = run("rollout", "status", "micro-2")
    assert code == 0
    assert "install      0 of 0 bad, tolerated 2.0%; evidence +0.00, halts at 4.61" in out
    assert run("rollout", "status")[1].splitlines()[0].split() == [
        "id",
        "status",
        "stage",
        "installed",
        "reason",
    ]


@pytest.mark.slow
def test_pause_resume_and_rollback_with_reasons(run: Run, begun: list[str]) -> None:
    assert value(run, "rollout", "pause", "micro-2", "--reason", "logs")["status"] == "paused"
    code, _, err = run("rollout", "pause", "micro-2", "--reason", "logs")
    assert (code, "is paused (logs); it cannot be paused now" in err) == (2, True)
    assert value(run, "rollout", "resume", "micro-2", "--reason", "fine")["status"] == "running"
    found = value(run, "rollout", "rollback", "micro-2", "--reason", "slow")
    assert (found["status"], found["wanted_content"]) == ("awaiting_signature", 1)
    _, out, _ = run("rollout", "status", "micro-2")
    assert "publish the content of release 1 as a new version" in out
    found = value(run, "rollout", "rollback", "micro-2", "--replacement", "3", "--reason", "slow")
    assert (found["status"], found["replacement"]) == ("rolled_back", 3)  # nobody had it


@pytest.mark.slow
def test_a_halted_rollout_is_overridden_with_a_reason(run: Run, begun: list[str], filled: Registry) -> None:
    rollouts = Rollouts(filled)
    for device in begun[:3]:
        rollouts.note(Report(device, 2, "install_failed"))
    assert value(run, "rollout", "status", "micro-2")["status"] == "awaiting_signature"
    assert run("rollout", "resume", "micro-2", "--reason", "lab")[0] == 2
    found = value(run, "rollout", "resume", "micro-2", "--override", "--reason", "lab")
    assert (found["status"], found["evidence"][0]["judged"]) == ("running", 0)


@pytest.mark.slow
def test_the_trail_shows_who_did_what_and_holds(run: Run, begun: list[str], filled: Registry) -> None:
    entries = value(run, "audit", "show", "--subject", "micro-2")
    assert [each["what"] for each in entries] == ["planned", "opened canary"]
    assert entries[0]["why"].startswith("round 40 (plan ")
    assert entries[0]["who"]
    assert len(value(run, "audit", "show", "--last", "1")) == 1
    code, out, _ = run("audit", "verify")
    assert code == 0
    head = out.split("head ")[1].strip()
    assert value(run, "audit", "verify", "--anchor", head)["broken"] is None
    with writing(filled.engine) as connection:
        connection.execute(schema.audit.update().where(schema.audit.c.number == 2).values(who="x"))
    code, out, _ = run("audit", "verify", "--format", "json")
    assert (code, json.loads(out)["broken"]) == (1, 2)
    assert run("audit", "verify")[1].startswith("BROKEN at entry 2: it was changed")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("rollout", "start", "9"), "release 9: there is none"),
        (("rollout", "start", "1", "--tier", "board"), "holds nothing for tier 'board'"),
        (("rollout", "start", "1", "--plan", "nowhere.toml"), "no such file"),
        (("rollout", "status", "x"), "rollout 'x': there is none"),
        (("rollout", "pause", "x", "--reason", " "), "say why"),
        (("audit", "verify", "--anchor", "x"), "must be NUMBER:DIGEST"),
        (("audit", "show", "--last", "0"), "--last 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(run: Run, words: tuple[str, ...], why: str) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert why in err


def test_a_start_for_several_tiers_begins_in_all_of_them_or_in_none(run: Run, filled: Registry) -> None:
    same = {"recipe": "int8", "wire": "w", "installed": "m", "evidence": "e"}
    filled.record_release(
        version=4, run_id="r", round_number=1, global_model="g", manifest=b"{}",
        variants=[{"tier": tier, **same} for tier in ("board", "micro")],
    )  # fmt: skip
    assert run("rollout", "start", "4", "--tier", "micro")[0] == 0
    code, _, err = run("rollout", "start", "4")
    assert (code, "the tier is at 4 already (rollout micro-4)" in err) == (2, True)
    assert [each["id"] for each in value(run, "rollout", "status")] == ["micro-4"]


def test_an_empty_home_has_no_rollouts_and_no_entries(run: Run) -> None:
    assert run("rollout", "status")[1] == "no rollouts\n"
    assert run("audit", "show")[1] == "no entries\n"
    assert run("audit", "verify")[1] == "0 entries hold\n"
