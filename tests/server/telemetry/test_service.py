"""From a device's collector over a real connection into the database, through refusals and lost replies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.errors import FedgeError
from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge.wire.v1 import telemetry_pb2 as pb
from fedge.wire.v1 import telemetry_pb2_grpc
from fedge_client.telemetry.collector import Answering, Collector
from fedge_client.telemetry.sending import send
from fedge_server.registry.database import Registry
from fedge_server.telemetry.service import TelemetryService
from fedge_server.telemetry.store import Telemetry

HOUR, START = 3600, 400_000 * 3600.0
SPEC = Spec("features", (2,), "float32", ("no", "yes"))
DRAW = np.random.default_rng(0)
X, P = DRAW.normal(size=(200, 2)).astype(np.float32), DRAW.dirichlet([1, 1], 200)
REFERENCE = Reference.of(X, P, SPEC)
DEVICE = "d" * 64
Stub = Any


async def admit(_: Any) -> Any:
    return SimpleNamespace(node_id=7), SimpleNamespace(id=DEVICE, tier="micro")


@pytest.fixture
def clock() -> list[float]:
    return [START]


@pytest.fixture
def telemetry(registry: Registry, clock: list[float]) -> Telemetry:
    registry.begin_run("r", task="t", seed=0, config={}, data="")
    registry.record_release(version=1, run_id="r", round_number=1, global_model="", manifest=b"", variants=[])
    return Telemetry(registry.engine, references=lambda *_: REFERENCE, now=lambda: clock[0])


@pytest.fixture
def collector(tmp_path: Path, clock: list[float]) -> Collector:
    made = Collector(tmp_path / "telemetry", Answering(1, SPEC, REFERENCE), now=lambda: clock[0])
    for _ in range(3):
        made.answered(X[:40], P[:40], 0.01)
        clock[0] += HOUR
        made.due(1)
    return made


def over(telemetry: Telemetry, use: Callable[[Stub], Awaitable[Any]]) -> Any:
    """Run against a real server on a port of its own."""

    async def main() -> Any:
        server = grpc.aio.server()
        service = TelemetryService(admit, telemetry, lambda _: ("lab",))
        telemetry_pb2_grpc.add_TelemetryServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await use(telemetry_pb2_grpc.TelemetryStub(channel))
        finally:
            await server.stop(None)

    return asyncio.run(main())


def test_what_a_device_has_counted_arrives_once(telemetry: Telemetry, collector: Collector) -> None:
    async def twice(stub: Stub) -> tuple[int, int]:
        lost: list[int] = []

        async def with_a_lost_reply(request: pb.TelemetryRequest) -> pb.TelemetryReply:
            reply: pb.TelemetryReply = await stub.Report(request)
            if not lost:
                lost.append(1)
                raise ConnectionError
            return reply

        with pytest.raises(ConnectionError):
            await send(collector, with_a_lost_reply)
        return await send(collector, with_a_lost_reply), await send(collector, stub.Report)

    assert over(telemetry, twice) == (3, 0)
    found = telemetry.summary("micro", 1, tag="lab")
    assert found is not None
    assert (len(found.devices), found.windows, found.requests) == (1, 3, 120)


def test_a_window_that_is_refused_is_not_sent_again(telemetry: Telemetry, collector: Collector) -> None:
    collector.installed(Answering(9, SPEC))  # a release that the server does not know
    collector.answered(X[:5], P[:5], 0.01)
    collector.installed(Answering(1, SPEC))
    assert over(telemetry, lambda stub: send(collector, stub.Report)) == 3
    assert collector.due(10) == []


def test_a_database_that_refuses_leaves_the_windows_on_the_device(
    telemetry: Telemetry, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise FedgeError("database: away")

    with monkeypatch.context() as patch:
        patch.setattr(telemetry, "take", away)
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            over(telemetry, lambda stub: send(collector, stub.Report))
    assert len(collector.due(10)) == 3


def test_too_many_windows_and_too_many_calls_are_refused(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def many(stub: Stub) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match="more than 64 windows"):
            await stub.Report(pb.TelemetryRequest(windows=[b""] * 65))
        calls = [stub.Report(pb.TelemetryRequest(windows=[b"x"] * 64)) for _ in range(8)]
        done = await asyncio.gather(*calls, return_exceptions=True)
        refused = [each for each in done if isinstance(each, grpc.aio.AioRpcError)]
        assert all(each.code() == grpc.StatusCode.RESOURCE_EXHAUSTED for each in refused)
        answered = [each for each in done if not isinstance(each, BaseException)]
        assert answered
        assert {outcome.kind for each in answered for outcome in each.outcomes} == {3}

    over(telemetry, many)
