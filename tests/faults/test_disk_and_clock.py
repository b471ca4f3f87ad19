"""A full disk and a wrong clock: what cannot be done is said, nothing is lost, and it works once it can."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from federation import Federation, wait_for
from gate import TASK, Gate

DEVICES = 2


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A tmpfs of a few megabytes."""

    folder: Path

    def resize(self, megabytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", self.folder], check=True)

    def fill(self, leave: int = 0) -> None:
        """Use all space up but so many bytes."""
        free = shutil.disk_usage(self.folder).free
        (self.folder / "ballast").write_bytes(bytes(max(free - leave, 0)))

    def clear(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


def other_clock(shift: str) -> list[str]:
    """A prefix for commands whose wall clock is off by so much."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("libfaketime (of Debian's package faketime) is not installed")
    return ["env", f"LD_PRELOAD={found[0]}", f"FAKETIME={shift}", "FAKETIME_DONT_FAKE_MONOTONIC=1"]


def gated(folder: Path) -> dict[str, str]:
    """Put the task with a wide model into the folder, its gate open."""
    Gate.install(folder).open()
    return {"PYTHONPATH": str(folder)}


WIDE = {"model": {"name": "wide", "standardise": False}}  # 4.3 MB


@pytest.mark.slow
def test_a_device_whose_disk_is_full_says_so_and_works_once_there_is_space(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    environment = gated(tmp_path)
    with Federation(tmp_path, DEVICES, TASK, environment=environment) as federation:
        full = federation.enrol("full", home=small_disk.folder, data=tmp_path / "device-0.npz")
        federation.start_agents()
        small_disk.fill(leave=1_000_000)
        run_id = federation.start_run({"rounds": {"count": 2}, **WIDE})
        federation.wait_run(run_id)
        for _, record, _ in federation.rounds(run_id)[1:]:
            assert record["clients"] == DEVICES
            (rejected,) = record["rejected"]
            assert rejected["client"] == full.node_id
            assert "no room on this device's disk" in rejected["reason"]

        small_disk.clear()
        federation.wait_online(full)
        run_id = federation.start_run({"rounds": {"count": 1}, **WIDE})
        federation.wait_run(run_id)
        assert federation.rounds(run_id)[1][1]["clients"] == DEVICES + 1


@pytest.mark.slow
def test_a_server_whose_disk_is_full_keeps_what_is_committed_and_goes_on_once_there_is_space(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    environment = gated(tmp_path)
    gate = Gate(tmp_path / "gate")
    home = small_disk.folder / "server"
    with Federation(tmp_path, DEVICES, TASK, server_home=home, environment=environment) as federation:
        small_disk.resize(512)
        federation.start_agents()
        gate.close()
        run_id = federation.start_run({"rounds": {"count": 3, "deadline_s": 60.0}, **WIDE})
        gate.pass_one_round(DEVICES)
        wait_for(lambda: len(federation.rounds(run_id)) == 2, "round 1 is committed")
        gate.wait(DEVICES)
        committed = federation.rounds(run_id)
        small_disk.fill(leave=500_000)  # less than one update
        gate.open()
        wait_for(lambda: _says_so(federation, run_id), "the hub or the worker says that there is no space")
        assert federation.hub is not None
        assert federation.hub.alive
        small_disk.clear()

        if federation.run_row(run_id)["status"] == "failed":  # it could not wait: a new run works
            run_id = federation.start_run({"rounds": {"count": 1}, **WIDE})
            federation.wait_run(run_id)
        else:
            federation.wait_run(run_id, timeout_s=240)
            assert len(federation.rounds(run_id)) == 4
            assert federation.rounds(run_id)[:2] == committed
        federation.wait_online(*federation.devices)


def _says_so(federation: Federation, run_id: str) -> bool:
    assert federation.hub is not None
    log = federation.home / "runs" / run_id / "log"
    texts = [federation.hub.tail(), log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""]
    return any("space" in text for text in texts) or federation.run_row(run_id)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["-23h", "+23h"])
def test_a_device_whose_clock_is_a_day_wrong_still_trains(tmp_path: Path, shift: str) -> None:
    prefix = other_clock(shift)
    with Federation(tmp_path, 1) as federation:
        (device,) = federation.devices
        federation.start_agent(device, prefix=prefix)
        run_id = federation.start_run({"rounds": {"count": 1}})
        federation.wait_run(run_id)
        assert federation.rounds(run_id)[1][1]["clients"] == 1


@pytest.mark.slow
def test_a_device_whose_clock_is_a_month_ahead_is_told_so_and_keeps_trying(tmp_path: Path) -> None:
    prefix = other_clock("+30d")
    with Federation(tmp_path, 1) as federation:
        (device,) = federation.devices
        federation.start_agent(device, prefix=prefix, wait=False)
        assert device.process is not None
        process = device.process
        wait_for(
            lambda: "set the device's clock" in process.tail(200), "the agent names the clock, no outage"
        )
        assert process.alive
        started = time.monotonic()
        process.end()
        assert time.monotonic() - started < 10
