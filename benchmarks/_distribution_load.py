"""The load of `distribution.py`, in a process of its own: devices that fetch, stall or poll; HTTPS clients.

`python _distribution_load.py PART FILE` reads what it needs from a JSON file and prints a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from _stubs import raise_file_limit

from fedge.wire.v1 import distribution_pb2 as pb
from fedge.wire.v1.distribution_pb2_grpc import DistributionStub
from fedge_client.delivery import OPTIONS

CONNECT_S = 60.0
THREADS = 8  # of the HTTPS clients


def channel(told: dict[str, Any], number: int) -> grpc.aio.Channel:
    """A connection of its own for a device."""
    key, certificate = told["devices"][number % len(told["devices"])]
    credentials = grpc.ssl_channel_credentials(told["bundle"].encode(), key.encode(), certificate.encode())
    return grpc.aio.secure_channel(told["address"], credentials, OPTIONS)


async def fetch(told: dict[str, Any]) -> dict[str, float]:
    """Every device fetches the file over a connection of its own, all at once."""
    channels = [channel(told, number) for number in range(told["count"])]

    async def one(each: grpc.aio.Channel) -> int:
        call = DistributionStub(each).Fetch(pb.FileRequest(name=told["name"]), wait_for_ready=True)
        came = 0
        while (part := await call.read()) is not grpc.aio.EOF:
            came += len(part.data)
        return came

    began = time.perf_counter()
    came = await asyncio.gather(*map(one, channels))
    seconds = time.perf_counter() - began
    assert set(came) == {told["bytes"]}, "a file came short"
    await asyncio.gather(*(each.close() for each in channels))
    return {"seconds": seconds, "mb_per_s": sum(came) / seconds / 1e6}


async def stalled(told: dict[str, Any]) -> dict[str, float]:
    """Polls of one device, before and while others have begun to read a large file and take no more."""
    channels = [channel(told, number) for number in range(told["count"] + 1)]
    stub = DistributionStub(channels[0])

    async def polls(number: int) -> list[float]:
        took = []
        for _ in range(number):
            began = time.perf_counter()
            await stub.Poll(pb.PollRequest(wire_version=2), wait_for_ready=True)
            took.append(1000 * (time.perf_counter() - began))
            await asyncio.sleep(0.02)
        return sorted(took)

    await polls(5)
    before = await polls(told["polls"])
    calls = [DistributionStub(each).Fetch(pb.FileRequest(name=told["name"])) for each in channels[1:]]
    for call in calls:
        assert (await call.read()).data
    await asyncio.sleep(0.5)
    after = await polls(told["polls"])
    for call in calls:
        call.cancel()
    await asyncio.gather(*(each.close() for each in channels))
    return {
        "quiet_median_ms": before[len(before) // 2],
        "median_ms": after[len(after) // 2],
        "worst_ms": after[-1],
        "quiet_worst_ms": before[-1],
    }


async def storm(told: dict[str, Any]) -> dict[str, float]:
    """New connections, all at once, each with a poll: seconds from the first to each answer."""
    channels = [channel(told, number) for number in range(told["count"])]
    began = time.perf_counter()

    async def one(each: grpc.aio.Channel) -> float:
        poll = DistributionStub(each).Poll(
            pb.PollRequest(wire_version=2), wait_for_ready=True, timeout=CONNECT_S
        )
        await poll
        return time.perf_counter() - began

    took = sorted(await asyncio.gather(*map(one, channels)))
    await asyncio.gather(*(each.close() for each in channels))
    return {"p50_s": took[len(took) // 2], "p99_s": took[int(0.99 * len(took)) - 1], "worst_s": took[-1]}


def https(told: dict[str, Any]) -> dict[str, float]:
    """As many clients of HTTP/1.1 over TLS, in threads, each with a connection of its own."""
    context = ssl.create_default_context(cadata=told["bundle"])
    context.load_cert_chain(told["pair"])
    host, port = told["address"].split(":")
    request = f"GET /{told['name']} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()

    def one(_: int) -> int:
        room = memoryview(bytearray(256 * 1024))
        with (
            socket.create_connection((host, int(port)), CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            secured.sendall(request)
            head = b""
            while b"\r\n\r\n" not in head:
                head += secured.recv(4096)
            came = len(head.partition(b"\r\n\r\n")[2])
            while length := secured.recv_into(room):
                came += length
            return came

    with ThreadPoolExecutor(THREADS) as threads:
        began = time.perf_counter()
        came = list(threads.map(one, range(told["count"])))
        seconds = time.perf_counter() - began
    assert set(came) == {told["bytes"]}, "a file came short"
    return {"seconds": seconds, "mb_per_s": sum(came) / seconds / 1e6}


def main(part: str, path: Path) -> None:
    """Run a part and print what it has found, with the CPU seconds that this process took."""
    raise_file_limit()
    told = json.loads(path.read_text())
    work = {"fetch": fetch, "stalled": stalled, "storm": storm}
    found = https(told) if part == "https" else asyncio.run(work[part](told))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**found, "client_cpu_s": used.ru_utime + used.ru_stime}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
