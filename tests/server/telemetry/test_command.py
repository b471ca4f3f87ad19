"""`fedge-server telemetry`: what it prints of windows that came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedge.telemetry.sketch import Sketch, latency_bin
from fedge.telemetry.window import Window
from fedge_server.cli import main
from fedge_server.cli import telemetry as command
from fedge_server.registry.database import Registry
from fedge_server.telemetry.store import Sender, Settings, Telemetry

HOUR = 3600
NOW = 480_000  # hours since 1970; the commands run at half past


def window(slot: int, version: int, answers: tuple[int, int]) -> bytes:
    sketch, count = Sketch.empty(features=0, classes=2), sum(answers)
    sketch.answers[:] = answers
    sketch.confidence[17] = sketch.latency[latency_bin(0.004)] = count
    sketch.routes[:] = count - 4, 4, 0, 0, 2
    return Window(slot=slot, period_s=HOUR, version=version, sketch=sketch).to_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two tiers; in one of them each device's answers turn round after thirty windows."""
    monkeypatch.setattr(command, "time", SimpleNamespace(time=lambda: (NOW + 0.5) * HOUR))
    with Registry.open(tmp_path) as registry:
        registry.begin_run("run-1", task="digits", seed=0, config={}, data="")
        for version in (1, 2):
            registry.record_release(
                version=version, run_id="run-1", round_number=1, global_model="", manifest=b"", variants=[]
            )
        clock = [0.0]
        store = Telemetry(registry.engine, Settings(keep_s=1e9), now=lambda: clock[0])
        for slot in range(36):
            clock[0] = (NOW - 36 + slot) * HOUR
            for number in range(10):
                sender = Sender(f"{number:064x}", "micro", ("lab",) if number < 4 else ())
                shares = (30 + number + slot % 3, 10) if slot < 30 else (5, 40)
                (outcome,) = store.take(sender, [window(NOW - 36 + slot, 2, shares)])
                assert outcome.kind == "counted"
        store.take(Sender("f" * 64, "board"), [window(NOW - 1, 1, (30, 10))])
        yield tmp_path


@pytest.mark.slow
def test_a_line_for_each_tier_and_release(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["telemetry", "ls", "--home", str(home)]) == 0
    head, board, micro = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "tier",
        "release",
        "devices",
        "requests",
        "errors",
        "cloud",
        "confidence",
        "p50",
        "p95",
        "drift",
    ]
    assert board.split()[:7] == ["board", "1", "1", "42", "4.76%", "9.52%", "0.875"]
    assert board.endswith("1 of 10,000")
    assert micro.split()[:3] == ["micro", "2", "10"]
    assert "ALARM answers since" in micro


@pytest.mark.slow
def test_one_release_in_full_and_by_tag_and_time(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--home", str(home), "--format", "json"]
    assert main(["telemetry", "show", "micro", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["release"], found["devices"], found["windows"]) == (2, 10, 360)
    assert found["latency"]["p50_s"] == pytest.approx(0.004, rel=0.1)
    assert found["drift"]["streams"].keys() == {"inputs", "confidence", "answers", "newcomers"}
    assert found["drift"]["evidence"] >= found["drift"]["threshold"] == 10_000
    assert found["drift"]["alarm"]["stream"] == "answers"
    assert main(["telemetry", "show", "micro", "2", "--tag", "lab", "--days", "0.2", *options]) == 0
    recent = json.loads(capsys.readouterr().out)
    assert (recent["devices"], recent["windows"]) == (4, 16)  # of 4.8 hours, those that began in them
    assert main(["telemetry", "show", "micro", "--home", str(home)]) == 0
    assert "drift alarm stream        answers\n" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_not_there_is_said(
    home: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["telemetry", "show", "gateway", "--home", str(home)]) == 2
    assert "tier 'gateway': no window" in capsys.readouterr().err
    assert main(["telemetry", "ls", "--days", "-1", "--home", str(home)]) == 2
    assert "--days -1" in capsys.readouterr().err
    empty = tmp_path_factory.mktemp("empty")
    Registry.open(empty).close()
    assert main(["telemetry", "ls", "--home", str(empty)]) == 0
    assert capsys.readouterr().out == "no window has come\n"
