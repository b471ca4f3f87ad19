"""The agent's text file for the node exporter."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedge_client.agent import figures
from fedge_client.agent.figures import Counts, Textfile, looked_up, text


def series(written: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(written)
        for sample in family.samples
    }


def test_the_file_holds_counts_and_what_the_agent_says_of_itself(tmp_path: Path) -> None:
    counts = Counts()
    counts.add("fedge_agent_messages_total", "done")
    counts.add("fedge_agent_bytes_total", "up", 1500)
    (tmp_path / "telemetry" / "3").mkdir(parents=True)
    (tmp_path / "telemetry" / "3" / "17.window").touch()
    path = tmp_path / "fedge.prom"
    facts = {"state": "connected", "working": ["m1"], "outbox": 2, "clock_skew_s": -3}
    Textfile(path, tmp_path, lambda: facts, 1.0).write(counts.values(), facts)
    found = series(path.read_text())
    assert found["fedge_agent_messages_total", "done"] == 1
    assert found["fedge_agent_messages_total", "failed"] == 0
    assert found["fedge_agent_bytes_total", "up"] == 1500
    assert found["fedge_agent_connected", ""] == 1
    assert found["fedge_agent_clock_skew_seconds", ""] == -3
    assert (found["fedge_agent_working", ""], found["fedge_agent_outbox", ""]) == (1, 2)
    assert found["fedge_agent_telemetry_windows_waiting", ""] == 1
    assert found["fedge_agent_resident_memory_bytes", ""] > 1e6
    assert found["fedge_agent_last_contact_timestamp_seconds", ""] == pytest.approx(time.time(), abs=60)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.glob("*.prom*")] == ["fedge.prom"]
    if shutil.which("promtool"):
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(command, input=path.read_bytes(), capture_output=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_device_that_has_nothing_yet_tells_what_there_is(tmp_path: Path) -> None:
    names = {name for name, _, _ in looked_up(tmp_path, {})}
    assert "fedge_agent_release_version" not in names
    assert "fedge_agent_last_contact_timestamp_seconds" not in names
    assert {name: value for name, _, value in looked_up(tmp_path, {})}["fedge_agent_connected"] == 0


def test_a_label_cannot_end_its_quotes() -> None:
    written = text([("fedge_agent_info", 'a"b\\c\nd', 1.0)])
    assert series(written) == {("fedge_agent_info", 'a"b\\c\nd'): 1.0}


def test_a_folder_that_is_not_there_is_said_once_and_written_when_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "later" / "fedge.prom"

    async def go() -> None:
        running = asyncio.create_task(Textfile(path, tmp_path, dict, 0.01).run())
        deadline = time.monotonic() + 10
        while not caplog.records:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        path.parent.mkdir()
        while not path.exists():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with caplog.at_level("WARNING", logger="fedge.agent"):
        asyncio.run(go())
    assert [each.getMessage() for each in caplog.records] == [
        f"metrics: {path} cannot be written (No such file or directory)"
    ]


def test_only_what_is_listed_can_be_counted() -> None:
    with pytest.raises(KeyError):
        Counts().add("fedge_agent_messages_total", "odd")
    assert len({figure.name for figure in figures.FIGURES}) == len(figures.FIGURES)
