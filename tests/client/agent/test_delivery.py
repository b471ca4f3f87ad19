"""Agents as real processes that get their releases from a service which does as a test says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedge_client import cli
from fedge_client.agent.installation import bring
from fedge_client.agent.standing import Done
from fedge_client.answers import Tally, count, tally
from fedge_client.delivery import Report
from fedge_client.device import Device
from fedge_client.reports import MAX_WAITING, Reports
from fedge_client.runtime import Runtime
from fedge_client.updater import folder


@pytest.fixture
def device(hub: Any, agent: Any, publisher: Any) -> Any:
    """An enrolled device of tier micro that trains nothing and has been given the publisher's root."""
    Device.create(agent.home, "micro", publisher.root)
    agent.write({}, delivery={"poll_s": 2, "retry_s": 1000})
    return agent


def offer(hub: Any, publisher: Any, version: int, *, answer: int) -> None:
    publisher.offer(version, answer=answer)
    hub.releases.version = version


def runs(home: Path) -> tuple[int, str]:
    runtime = Runtime.open(home)
    return runtime.release.version, runtime.infer(np.zeros((8, 8), np.uint8))[0].label


@pytest.mark.slow
def test_a_release_is_installed_while_the_agent_runs_and_what_became_of_it_is_reported(
    hub: Any, device: Any, publisher: Any, wait: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(hub, publisher, 1, answer=1)
    device.start()
    wait(lambda: hub.releases.kinds(1) == {"installed", "healthy", "latency_ms"})
    assert runs(device.home) == (1, "one")
    wait(lambda: hub.releases.polls[-1].has == 1 and device.status["delivery"] == "up to date")
    offer(hub, publisher, 2, answer=2)
    wait(lambda: "installed" in hub.releases.kinds(2))
    assert runs(device.home) == (2, "two")
    wait(lambda: not Reports(device.home).waiting())
    assert cli.main(["status", "--home", str(device.home), "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["version"], shown["previous"], shown["agent"]["reports_to_send"]) == (2, 1, 0)
    loaded = Path(f"/proc/{device.process.pid}/maps").read_text()
    assert not any(name in loaded for name in ("torch", "onnxruntime"))
    assert device.child is None
    assert device.terminate() == 0


@pytest.mark.slow
def test_a_bad_release_is_reported_quarantined_and_not_tried_again_and_the_next_one_is_taken(
    hub: Any, device: Any, publisher: Any, tools: Any, wait: Any
) -> None:
    offer(hub, publisher, 1, answer=1)
    device.start()
    wait(lambda: "installed" in hub.releases.kinds(1))
    trial = tools.golden_bytes(tools.constant_model(1))
    entry, wire = tools.entry_of("micro", tools.constant_model(0), golden_sha256=tools.sha256(trial))
    publisher.place(tools.release_of(2, (entry,)), (wire,), trial)
    hub.releases.version = 2
    wait(lambda: hub.releases.kinds(2) == {"install_failed"})
    device.logged("failed its trial")
    polls = len(hub.releases.polls)
    wait(lambda: len(hub.releases.polls) >= polls + 2)  # it waits for another answer
    assert hub.releases.polls[-1].told == 2
    models = [name for name, _ in hub.releases.fetched if name.endswith("2.model")]
    assert len(models) == 1
    assert runs(device.home) == (1, "one")
    offer(hub, publisher, 3, answer=2)
    wait(lambda: "healthy" in hub.releases.kinds(3))
    assert runs(device.home) == (3, "two")


@pytest.mark.slow
def test_an_outage_of_the_service_or_of_the_server_ends_nothing(
    hub: Any, device: Any, publisher: Any, wait: Any
) -> None:
    hub.releases.refuse_polls = grpc.StatusCode.UNAVAILABLE
    hub.releases.refuse_notes = True
    device.start()
    wait(lambda: len(hub.releases.polls) >= 2)
    hub.releases.refuse_polls = None
    offer(hub, publisher, 1, answer=1)
    wait(
        lambda: {one.kind for one in Reports(device.home).waiting()} == {"installed", "healthy", "latency_ms"}
    )
    device.kill()  # with its reports unsent
    hub.stop()
    device.start(wait=False)
    wait(lambda: device.status.get("state") == "waiting")
    hub.releases.refuse_notes = False
    hub.start()
    wait(lambda: hub.releases.kinds(1) == {"installed", "healthy", "latency_ms"})
    assert runs(device.home) == (1, "one")


@pytest.mark.slow
def test_a_stream_that_breaks_is_taken_up_where_it_did(
    hub: Any, device: Any, publisher: Any, tools: Any, wait: Any
) -> None:
    hub.releases.break_after = 8192
    model = tools.constant_model(2, filler=np.random.default_rng(0).bytes(60_000))
    entry, wire = tools.entry_of("micro", model)
    publisher.place(tools.release_of(1, (entry,)), (wire,))
    hub.releases.version = 1
    device.start()
    wait(lambda: "installed" in hub.releases.kinds(1))
    offsets = [offset for name, offset in hub.releases.fetched if name.endswith(".model")]
    assert offsets == list(range(0, len(wire), 8192))


@pytest.mark.slow
def test_an_agent_that_is_killed_after_the_commit_reports_at_its_next_start(
    hub: Any, device: Any, publisher: Any, wait: Any
) -> None:
    offer(hub, publisher, 1, answer=1)
    assert cli.main(["install", str(publisher.folder), "--home", str(device.home)]) == 0  # says nothing
    device.start()
    wait(lambda: hub.releases.kinds(1) == {"installed", "healthy", "latency_ms"})
    assert not [name for name, _ in hub.releases.fetched if name.endswith(".model")]


@pytest.mark.slow
def test_a_server_without_releases_is_asked_seldom_and_trains_on(
    hub: Any, device: Any, ping: Any, wait: Any
) -> None:
    hub.stop()
    hub.releases = None
    hub.start()
    device.write({"digits": {"data": "digits.npz"}})
    device.start()
    wait(lambda: device.status.get("delivery") == "the server has no releases")
    hub.send(ping("m1"))
    assert not hub.answer("m1")[0].HasField("failure")


@pytest.mark.slow
def test_a_device_that_takes_no_releases_asks_for_none(hub: Any, device: Any, wait: Any) -> None:
    device.write({}, delivery={"enabled": False})
    device.start()
    wait(lambda: device.status.get("delivery") == "off")
    device.logged("there is nothing to do")
    assert hub.releases.polls == []


@pytest.mark.slow
def test_with_once_the_agent_ends_when_the_release_runs(hub: Any, device: Any, publisher: Any) -> None:
    offer(hub, publisher, 1, answer=1)
    device.start("--once")
    assert device.process.wait(60) == 0
    assert runs(device.home) == (1, "one")
    assert "installed" in hub.releases.kinds(1)


@pytest.mark.slow
def test_install_without_a_folder_asks_the_server_once(
    hub: Any, device: Any, publisher: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def install() -> tuple[int, str]:
        command = [sys.executable, "-m", "fedge_client", "install", "--home", str(device.home)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert install() == (
        0,
        "nothing to install: the server has no release for this device now (tier micro)\n",
    )
    offer(hub, publisher, 1, answer=1)
    assert install() == (0, "installed release 1 (tier micro) from the server\n")
    assert "healthy" in hub.releases.kinds(1)
    assert install() == (0, "nothing to do: release 1 runs (tier micro)\n")
    offer(hub, publisher, 2, answer=2)
    shutil.rmtree(publisher.folder / "metadata")
    code, said = install()
    assert code == 1
    assert said.startswith("fedge-client: error: release 2: ")
    assert hub.releases.kinds(2) == set()  # not the release's fault
    assert runs(device.home) == (1, "one")


@pytest.mark.slow
def test_mean_confidence_is_reported_once_there_are_enough_answers(
    hub: Any, device: Any, publisher: Any, wait: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    device.write({}, delivery={"poll_s": 1, "answers": 3})
    offer(hub, publisher, 1, answer=1)
    device.start()
    wait(lambda: "installed" in hub.releases.kinds(1))
    np.save(device.home / "x.npy", np.zeros((2, 8, 8), np.uint8))
    infer = ["infer", str(device.home / "x.npy"), "--home", str(device.home)]
    assert cli.main(infer) == 0
    polls = len(hub.releases.polls)
    wait(lambda: len(hub.releases.polls) >= polls + 2)
    assert "confidence" not in hub.releases.kinds(1)
    assert cli.main(infer) == 0
    wait(lambda: "confidence" in hub.releases.kinds(1))
    (value,) = [value for _, kind, value in hub.releases.reports if kind == "confidence"]
    assert value == pytest.approx(0.96467, abs=1e-4)  # e^4 / (e^4 + 2)


# Its files


def test_a_report_is_kept_until_it_is_sent_and_made_once(tmp_path: Path) -> None:
    reports, first, second = Reports(tmp_path), Report(1, "installed"), Report(1, "latency_ms", 3.5)
    reports.add([first, second])
    reports.add([first, Report(2, "installed")])
    assert Reports(tmp_path).waiting() == [first, second, Report(2, "installed")]
    reports.drop([first, second])
    half = tmp_path / "delivery" / ".reports.json.abc"  # of a process that was killed while it wrote
    half.write_bytes(b"{")
    reports.add([first])
    assert not half.exists()
    assert reports.waiting() == [Report(2, "installed")]
    assert reports.has_said(1, "installed")
    assert not reports.has_said(3, "installed")
    reports.add([Report(version, "healthy") for version in range(1000)])
    assert len(reports.waiting()) == MAX_WAITING
    assert reports.waiting()[-1].version == 999


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": 9}', b"\xff", b"[" * 9999, b'{"schema": 1}'])
def test_damaged_files_of_reports_and_answers_begin_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "delivery").mkdir()
    for name in ("reports.json", "answers.json"):
        (tmp_path / "delivery" / name).write_bytes(content)
    assert Reports(tmp_path).waiting() == []
    Reports(tmp_path).add([Report(1, "healthy")])
    assert Reports(tmp_path).waiting() == [Report(1, "healthy")]
    count(tmp_path, 4, [0.5, 1.0])
    assert tally(tmp_path) == Tally(4, 2, 1.5)


def test_answers_are_counted_of_one_version_and_a_disk_in_the_way_costs_nothing_else(tmp_path: Path) -> None:
    count(tmp_path / "absent", 1, [0.5])
    (tmp_path / "delivery").mkdir()
    count(tmp_path, 1, [])
    assert tally(tmp_path) == Tally()
    count(tmp_path, 1, [0.5, float("nan"), 7.0])
    count(tmp_path, 1, [1.0])
    assert tally(tmp_path).mean == 0.75
    count(tmp_path, 2, [0.25])
    assert tally(tmp_path) == Tally(2, 1, 0.25)


def test_a_tier_that_has_no_release_yet_is_no_matter_of_trust_until_the_device_has_one(
    tmp_path: Path, publisher: Any
) -> None:
    publisher.write()
    device, fetch = Device.create(tmp_path / "home", "micro", publisher.root), folder(publisher.folder)
    done = bring(device, fetch, 0)
    assert "metadata says nothing of it" in done.fault
    assert done.refused == ""
    assert bring(device, fetch, 1).refused == "UnlistedError"  # the server had told of one
    publisher.offer(1, answer=1)
    assert bring(device, fetch, 1).changed


def test_what_an_installation_says_is_read_back_and_anything_else_refused() -> None:
    done = Done(3, True, "why " * 2000, passing=True)
    assert Done.from_line(done.to_line()) == Done(3, True, ("why " * 2000)[:1000], passing=True)
    for line in (b"", b"Traceback", b"{}", b"[1]", b"[" * 9999):
        with pytest.raises(Exception, match="ended without a result"):
            Done.from_line(line)
