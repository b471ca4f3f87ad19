"""The options of both ends of a connection agree, and gRPC knows them: it ignores a name that it does not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc._cython import cygrpc

from fedge_client import delivery
from fedge_client.agent import connection
from fedge_client.joint import cloud
from fedge_server.hub.listening import DEVICE_OPTIONS

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "server", "client", "simulations")
SHORT = 25  # times shorter than in earnest; a client of gRPC pings once a second at most
CLIENTS = {
    "agent": connection._OPTIONS,
    "delivery": delivery.OPTIONS,
    "joint inference": cloud._OPTIONS,
}
Options = tuple[tuple[str, int], ...]


def test_every_option_is_one_that_the_library_knows() -> None:
    library = Path(cygrpc.__file__).read_bytes()
    code = "".join(path.read_text("utf-8") for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    named = set(re.findall(r'"(grpc\.[a-z0-9_.]+)",', code))
    assert {"grpc.keepalive_time_ms", "grpc.max_concurrent_streams"} < named
    assert [name for name in sorted(named) if name.encode() not in library] == []


@pytest.mark.parametrize("who", CLIENTS)
def test_no_ping_of_a_device_comes_sooner_than_the_hub_allows(who: str) -> None:
    """They leave `time` apart, and one takes `timeout` at most, or the device gives the connection up."""
    device, hub = dict(CLIENTS[who]), dict(DEVICE_OPTIONS)
    least = hub["grpc.http2.min_ping_interval_without_data_ms"]
    assert device["grpc.keepalive_time_ms"] - device["grpc.keepalive_timeout_ms"] >= least
    assert device["grpc.keepalive_time_ms"] >= 2 * least
    assert hub["grpc.keepalive_permit_without_calls"] == 1  # else two hours, while no call is open


def shortened(options: Options) -> Options:
    """The same options, with all times so much shorter."""
    return tuple((name, value // SHORT if name.endswith("_ms") else value) for name, value in options)


async def still_open_after(server_options: Options, client_options: Options, wait_s: float) -> bool:
    """Whether a stream on which nothing is said stands after a time, or was ended by the server."""
    closing = asyncio.Event()

    async def quiet(_: bytes, __: Any) -> AsyncIterator[bytes]:
        yield b""
        await closing.wait()

    handler = grpc.unary_stream_rpc_method_handler(quiet)
    server = grpc.aio.server(options=server_options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedge.Test", {"Hear": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=client_options) as channel:
        call = channel.unary_stream("/fedge.Test/Hear")(b"")
        await call.read()
        done, _ = await asyncio.wait([asyncio.ensure_future(call.code())], timeout=wait_s)
        if done:
            assert "ping" in await call.details()
        closing.set()
    await server.stop(0)
    return not done


@pytest.mark.slow
def test_a_quiet_connection_stays_open_and_would_not_if_the_hub_took_grpcs_own_interval() -> None:
    allowed = shortened(DEVICE_OPTIONS)
    default = tuple(pair for pair in allowed if "min_ping_interval" not in pair[0])

    async def both() -> list[bool]:
        device = shortened(connection._OPTIONS)
        return await asyncio.gather(*(still_open_after(hub, device, 9.0) for hub in (allowed, default)))

    assert asyncio.run(both()) == [True, False]
