"""A cloud in a process of its own, over mutual TLS, through a network that fails: every request is answered
once, by its deadline.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inference_site import SPEC, Device, Site
from proxy import NONE, FaultProxy, Faults

from fedge.inference import CompactModel
from fedge.routing import Rule
from fedge_client.joint import BreakerSettings, Budget, CloudAnswer, Joint, JointSettings
from fedge_client.joint.cloud import GrpcCloud
from fedge_client.runtime import Runtime
from fedge_client.serving.holder import Holder

ROOT = Path(__file__).parents[2]
SURE, UNSURE = [8.0, 0.0], [0.1, 0.0]  # the variant's logits are its input
DEADLINE_S = 1.0
pytestmark = pytest.mark.usefixtures("quick_sqlite")


@contextmanager
def cloud_process(root: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The cloud, up."""
    path = ":".join(str(ROOT / name) for name in ("common", "server"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "faults" / "inference_site.py"), str(root), str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "GRPC_VERBOSITY": "NONE"},
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    site = Site(tmp_path)
    yield site.device()
    site.registry.close()


@pytest.fixture
def holder(tools: Any) -> Holder[Runtime]:
    model = tools.linear_model(SPEC, np.eye(2), np.zeros(2))
    entry, _ = tools.entry_of("micro", model)
    release = tools.release_of(1, (entry,), spec=SPEC)
    return Holder(Runtime(SimpleNamespace(release=release, entry=entry), CompactModel(model, SPEC)))


def settings(**values: Any) -> JointSettings:
    never = BreakerSettings(failures=10**9)
    return JointSettings(
        **{
            "rule": Rule("confidence", 0.2),
            "deadline_s": DEADLINE_S,
            "reserve_s": 0.3,
            "budget": Budget(1e9, 1e6),
            "breaker": never,
            **values,
        }
    )


class Tally:
    """How often each request was answered, by whom, and when the latest was."""

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()
        self.why: Counter[str] = Counter()
        self.latest = 0.0

    async def ask(self, joint: Joint, number: int) -> None:
        began = time.monotonic()
        first, second = await joint.infer(np.array([SURE, UNSURE], np.float32))
        self.latest = max(self.latest, time.monotonic() - began)
        self.answers[number] += 1
        self.why[second.why] += 1
        assert (first.source, first.prediction.label) == ("device", "no")
        assert second.prediction.label == ("yes" if second.source == "cloud" else "no")
        assert (second.source == "cloud") == (second.why == "asked")


async def asked(joint: Joint, count: int, *, at_once: int) -> Tally:
    tally, places = Tally(), asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            await tally.ask(joint, number)

    await asyncio.gather(*(one(i) for i in range(count)))
    assert tally.answers == Counter(range(count))  # none lost, none twice
    return tally


async def until_asked(joint: Joint) -> None:
    """Until the cloud answers again."""
    until = time.monotonic() + 30
    while (await asked(joint, 1, at_once=1)).why != {"asked": 1}:
        assert time.monotonic() < until
        await asyncio.sleep(0.02)


FAULTS = {
    "none": NONE,
    "black hole": Faults(swallow=True),
    "stalled": Faults(stall=True),
    "slow": Faults(delay_s=2.0),
    "reset": Faults(reset_after=6000),
    "damaged going up": Faults(flip_up=3000),
    "damaged coming down": Faults(flip_down=3000),
}


def run(work: Any, proxy: FaultProxy, device: Device, holder: Any, **values: Any) -> Any:
    async def scenario() -> Any:
        device.link_address = f"localhost:{proxy.port}"
        cloud = GrpcCloud(lambda: device)
        joint = Joint(holder, cloud, settings(**values))
        try:
            return await work(joint)
        finally:
            await joint.close()
            await cloud.close()

    return asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_request_is_answered_once_by_its_deadline_whatever_the_network_does(
    name: str, tmp_path: Path, device: Device, holder: Any
) -> None:
    with cloud_process(tmp_path) as (_, port), FaultProxy("localhost", port) as proxy:

        async def work(joint: Joint) -> tuple[Tally, Tally]:
            await until_asked(joint)
            before = await asked(joint, 200, at_once=20)
            proxy.faults = FAULTS[name]
            return before, await asked(joint, 200, at_once=50)

        before, during = run(work, proxy, device, holder)
    assert before.why == {"asked": 200}
    assert during.latest < DEADLINE_S
    if name == "none":
        assert during.why == {"asked": 200}
    if name in ("black hole", "stalled", "slow"):
        assert during.why["asked"] < 60  # those that were on their way


@pytest.mark.slow
def test_ten_thousand_requests_while_the_cloud_comes_and_goes(
    tmp_path: Path, device: Device, holder: Any
) -> None:
    """Killed, back on another port, black-holed, back: with a breaker, so that the waiting ends soon."""
    breaker = BreakerSettings(failures=5, first_s=0.05, most_s=0.5, trial_s=1.0)
    with FaultProxy("localhost", 9) as proxy:

        async def work(joint: Joint) -> list[Tally]:
            tallies = []

            async def batch() -> None:
                tallies.append(await asked(joint, 1250, at_once=50))

            await batch()  # nothing is there
            for _ in range(2):
                with cloud_process(tmp_path) as (process, port):
                    proxy.retarget("localhost", port)
                    proxy.reset_all()
                    await until_asked(joint)
                    await batch()
                    proxy.faults = Faults(swallow=True)
                    await batch()
                    proxy.faults = NONE
                    proxy.reset_all()
                    await until_asked(joint)
                    running = asyncio.create_task(batch())
                    await asyncio.sleep(0.3)
                    process.kill()  # in the middle
                    await running
            tallies.append(await asked(joint, 2500, at_once=50))
            return tallies

        tallies = run(work, proxy, device, holder, breaker=breaker)
    why = sum((tally.why for tally in tallies), Counter())
    assert sum(why.values()) == 11_250
    assert max(tally.latest for tally in tallies) < DEADLINE_S
    assert why["asked"] > 2500
    assert why["open"] > why["late"]  # the breaker spared the most


class Garbage:
    """A cloud whose answers are none."""

    async def ask(self, x: Any, spec: Any, version: int, timeout_s: float) -> CloudAnswer:
        return CloudAnswer(np.full((len(x) + 1, 2), np.nan, np.float32), version, "")


def test_garbage_is_told_from_an_answer(holder: Any) -> None:
    async def scenario() -> Tally:
        joint = Joint(holder, Garbage(), settings())
        try:
            return await asked(joint, 500, at_once=50)
        finally:
            await joint.close()

    tally = asyncio.run(scenario())
    assert tally.why == {"garbage": 500}
    assert tally.latest < DEADLINE_S


def test_something_else_behind_the_address_is_no_cloud(tmp_path: Path, device: Device, holder: Any) -> None:
    """A server that speaks, but no TLS."""

    async def scenario() -> Tally:
        async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello" * 100)
            writer.close()
            ended.append(asyncio.ensure_future(writer.wait_closed()))

        ended: list[asyncio.Future[None]] = []
        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        device.link_address = f"localhost:{port}"
        cloud = GrpcCloud(lambda: device)
        joint = Joint(holder, cloud, settings())
        try:
            return await asked(joint, 20, at_once=20)
        finally:
            await joint.close()
            await cloud.close()
            server.close()
            await asyncio.gather(*ended, return_exceptions=True)

    tally = asyncio.run(scenario())
    assert set(tally.why) <= {"down", "late"}
    assert tally.latest < DEADLINE_S


def test_a_device_that_is_revoked_answers_alone(tmp_path: Path, holder: Any) -> None:
    async def scenario() -> tuple[Tally, Tally]:
        from inference_site import answers_yes

        site = Site(tmp_path)
        device = site.device()
        async with site.up(answers_yes):
            device.link_address = site.address
            cloud = GrpcCloud(lambda: device)
            joint = Joint(holder, cloud, settings(deadline_s=5.0))
            before = await asked(joint, 5, at_once=1)
            site.registry.devices.revoke(device.id, "stolen")
            after = await asked(joint, 5, at_once=1)
            await joint.close()
            await cloud.close()
        site.registry.close()
        return before, after

    before, after = asyncio.run(scenario())
    assert (before.why, after.why) == ({"asked": 5}, {"refused": 5})
