"""One device, several processes: who counts, who closes, and who sends."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.spec import Spec
from fedge.telemetry.window import Window
from fedge.wire.v1 import telemetry_pb2 as pb
from fedge_client.agent.settings import TelemetrySettings
from fedge_client.agent.telling import Teller
from fedge_client.agent.work import Linked
from fedge_client.runtime import Prediction
from fedge_client.serving.answered import Answered
from fedge_client.telemetry.closing import Left
from fedge_client.telemetry.collector import Answering, Collector
from fedge_client.telemetry.counting import Counting, count_once
from fedge_client.telemetry.outgoing import FOLDER, MAX_PARTS, Outgoing, owned
from fedge_client.telemetry.settings import Settings


@pytest.fixture(autouse=True)
def device(tmp_path: Path) -> None:
    """What a home is told by."""
    (tmp_path / "delivery").mkdir()
    (tmp_path / "delivery" / "tier.json").write_text('{"schema": 1, "tier": "micro"}')


SPEC = Spec("features", (2,), "float32", ("no", "yes"))
HOUR = 3600
EVERY = Settings(keep_every_s=0.0)
X = np.zeros((3, 2), np.float32)
PREDICTIONS = [Prediction("no", 0.75, {"no": 0.75, "yes": 0.25})] * 3


def release(version: int = 1) -> Any:
    """What a runtime tells of itself."""
    installed = SimpleNamespace(entry=SimpleNamespace(reference_sha256=""))
    return SimpleNamespace(release=SimpleNamespace(version=version), spec=SPEC, installed=installed)


def answered(version: int = 1, route: Any = ("device",) * 3, why: Any = ("alone",) * 3) -> Answered:
    """Three answers."""
    labels = ("no", "yes")
    return Answered(version, "a" * 64, labels, PREDICTIONS, route, why, "", PREDICTIONS, X, 0.03)


def due(folder: Path, hours: int, settings: Settings = EVERY) -> list[Window]:
    """What the agent would send so many hours from now."""
    left = Left(folder, settings, now=lambda: time.time() + hours * HOUR)
    return [Window.from_bytes(data) for _, data in left.due(10)]


def test_a_window_that_nobody_counts_in_any_more_is_closed_by_who_sends_it(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    assert due(folder, 0) == []
    assert not folder.exists()  # a device that answers nothing has no folder
    count_once(tmp_path, EVERY, release(), answered())
    assert due(folder, 0) == []  # its hour is not over
    (found,) = due(folder, 2)
    assert found.sketch.routes.tolist() == [3, 0, 0, 0, 0]
    assert [window.slot for window in due(folder, 2)] == [found.slot]  # until the server has it
    Left(folder, EVERY).sent(found.slot)
    assert due(folder, 2) == []
    count_once(tmp_path, EVERY, release(), answered())
    (later,) = due(folder, 2)
    assert later.slot > found.slot  # it names another one, though its hour is the same


def test_with_noise_it_is_told_once_whoever_closes_it(tmp_path: Path) -> None:
    folder, noisy = tmp_path / FOLDER, Settings(keep_every_s=0.0, epsilon=1.0, most_epsilon=1.0)
    count_once(tmp_path, noisy, release(), answered())
    (found,) = due(folder, 2, noisy)
    assert found.epsilon == 1.0
    assert Outgoing(folder).noised == 1
    Left(folder, noisy).sent(found.slot)
    count_once(tmp_path, noisy, release(), answered())
    assert due(folder, 4, noisy) == []  # the budget is spent


def test_a_command_beside_a_service_is_counted_by_the_service(tmp_path: Path) -> None:
    counting, runtime = Counting(tmp_path, EVERY), release()
    counting.answered(answered())  # before the folder is owned: lost
    counting.tick(runtime)
    counting.answered(answered(route=("cloud", "device", "device"), why=("asked", "late", "open")))
    counting.answered(answered(2))  # of a release that does not answer any more
    counting.failed()
    count_once(tmp_path, EVERY, runtime, answered())
    count_once(tmp_path, EVERY, release(2), answered(2))  # another release: it does not add up
    assert due(tmp_path / FOLDER, 2) == []  # the service owns the window
    counting.close()
    assert not any((tmp_path / FOLDER / "parts").iterdir())
    (found,) = due(tmp_path / FOLDER, 2)
    assert found.sketch.routes.tolist() == [3, 1, 1, 1, 1]
    assert found.version == 1


def test_a_service_that_cannot_own_the_folder_yet_counts_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedge_client.telemetry.counting._PATIENCE_S", 0.0)
    counting, runtime = Counting(tmp_path, EVERY), release()
    with owned(tmp_path / FOLDER):
        counting.tick(runtime)
        counting.answered(answered())
    counting.tick(runtime)
    counting.answered(answered())
    counting.tick(release(2))  # installed: the window of the first is closed
    counting.close()
    (found,) = due(tmp_path / FOLDER, 0)
    assert (found.version, found.sketch.count) == (1, 3)


def test_what_nobody_takes_up_is_bounded_and_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    folder, runtime = tmp_path / FOLDER, release()
    with owned(folder):
        for _ in range(MAX_PARTS + 3):
            count_once(tmp_path, EVERY, runtime, answered())
        parts = folder / "parts"
        assert len(list(parts.iterdir())) == MAX_PARTS
        (parts / ".half").write_bytes(b"half")
        os.utime(parts / ".half", (0, 0))
        next(parts.iterdir()).write_bytes(b"no window")
        collector = Collector(folder, Answering(1, SPEC), EVERY)
        collector.tick()
        collector.keep()
    assert list(parts.iterdir()) == []
    (found,) = due(folder, 2)
    assert found.sketch.count in (3 * MAX_PARTS, 3 * (MAX_PARTS - 1))  # the damaged one, or the half one


class StubLink:
    """Takes windows, or fails as a connection does."""

    def __init__(self) -> None:
        self.came: list[bytes] = []
        self.fails: list[Exception] = []

    async def tell(self, request: pb.TelemetryRequest) -> pb.TelemetryReply:
        if self.fails:
            raise self.fails.pop(0)
        self.came += request.windows
        taken = pb.TelemetryReply.Outcome(kind=pb.TelemetryReply.Outcome.COUNTED)
        return pb.TelemetryReply(outcomes=[taken] * len(request.windows))


async def told(home: Path, settings: TelemetrySettings, link: StubLink, words: str) -> list[str]:
    """Let an agent's part run until it says these words."""
    linked, said, reached = Linked(), list[str](), asyncio.Event()

    def changed(now: str) -> None:
        said.append(now)
        if now.startswith(words):
            reached.set()

    linked.set(link)  # type: ignore[arg-type]
    teller = Teller(home, settings, linked=linked, changed=changed)
    running = asyncio.create_task(teller.run())
    async with asyncio.timeout(20):
        await reached.wait()
        await asyncio.sleep(0.05)  # what follows the words
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return said


def closed_window(home: Path) -> None:
    collector = Collector(home / FOLDER, Answering(1, SPEC), EVERY)
    collector.answered(X, np.full((3, 2), 0.5, np.float32), 0.01)
    collector.installed(Answering(2, SPEC))


def test_the_agent_sends_again_after_a_failure_and_drops_what_the_server_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedge_client.agent.telling.MOST_S", 0.05)
    closed_window(tmp_path)
    link, empty = StubLink(), grpc.aio.Metadata()
    absent = grpc.aio.AioRpcError(grpc.StatusCode.UNIMPLEMENTED, empty, empty)
    link.fails = [ConnectionResetError("gone"), RuntimeError("a fault of ours"), absent]
    said = asyncio.run(told(tmp_path, TelemetrySettings(), link, "sent"))
    assert said[:3] == ["tries again: gone", "tries again: an internal fault", "the server takes none"]
    (came,) = link.came
    assert Window.from_bytes(came).sketch.count == 3
    assert Outgoing(tmp_path / FOLDER).waiting() == []


def test_turned_off_it_sends_nothing_and_forgets_what_was_counted(tmp_path: Path) -> None:
    closed_window(tmp_path)
    link = StubLink()
    asyncio.run(told(tmp_path, TelemetrySettings(enabled=False), link, "off"))
    assert link.came == []
    assert Outgoing(tmp_path / FOLDER).waiting() == []
