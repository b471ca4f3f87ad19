"""What a device answers reaches the server once: hub, service and agent are processes that are killed."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import SCRIPTS, Process, wait_for
from fleet import AT_ONCE, TIER, Fleet, ask, digits, digits_model

from fedge.telemetry.window import Window
from fedge_client.cli import main
from fedge_client.telemetry.outgoing import FOLDER, Closed

PERIOD_S = 10  # of a window: the shortest
TOLD = {"telemetry": {"period_s": PERIOD_S}}


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="ft"))  # with a short name, for unix sockets
    least = {"telemetry": {"least_period_s": PERIOD_S}}
    try:
        with Fleet(folder, 0, 1, settings=least, agent_settings=TOLD) as fleet:
            yield fleet
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def told(fleet: Fleet) -> dict[str, Any]:
    """What the server says of the tier's newest release; empty before the first window."""
    (*_, found) = [{}, *json.loads(fleet.server("telemetry", "ls", "--format", "json"))]
    return found


@pytest.mark.slow
def test_what_a_device_answers_is_told_once_though_its_agent_is_killed(fleet: Fleet) -> None:
    (agent,) = fleet.federation.devices
    version = fleet.publish(digits_model(), "good")
    fleet.roll_out(version, AT_ONCE)
    fleet.start_agents()
    fleet.wait_running(version)
    command = [SCRIPTS / "fedge-client", "serve", "--home", agent.home, "--grpc", "off"]
    service = Process(command, fleet.folder / "serve.log", fleet.folder, {})
    try:
        wait_for((agent.home / "serving" / "http.sock").exists, "the service listens")
        x, _ = digits()
        wait_for(lambda: time.time() % PERIOD_S < PERIOD_S / 2, "one window has room for all that is asked")
        assert ask(agent.home / "serving" / "http.sock", x[:7])[0] == 200
        np.save(fleet.folder / "x.npy", x[:2])
        assert main(["infer", str(fleet.folder / "x.npy"), "--home", str(agent.home)]) == 0  # beside it
        assert agent.process is not None
        agent.process.kill()  # with what was counted on the disk, or in the service
        closed = Closed(agent.home / FOLDER)
        wait_for(closed.waiting, "the window is over")
        (slot,) = closed.waiting()
        window = closed.read(slot)
        assert window is not None
        assert Window.from_bytes(window).reference  # inputs are counted by what came with the release
        fleet.start_agents()
        wait_for(lambda: told(fleet), "the server has been told")
        agent.process.kill()
        (agent.home / FOLDER / f"{slot}.window").write_bytes(window)  # as if killed before it was dropped
        fleet.start_agents()
        wait_for(lambda: not closed.waiting(), "it was sent again")
    finally:
        service.end()
    found = told(fleet)
    assert (found["tier"], found["release"], found["devices"], found["windows"]) == (TIER, version, 1, 1)
    assert (found["requests"], found["errors"], found["sent_to_cloud"]) == (9, 0.0, 0.0)
    assert sum(found["answers"]) == 9
    assert 0 < found["latency"]["p50_s"] < 10
