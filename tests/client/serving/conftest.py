"""Runtimes without a disk, and a service that is up on sockets of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedge_client.runtime import Runtime
from fedge_client.serving.holder import Holder
from fedge_client.serving.limits import Limits
from fedge_client.serving.running import Address, Listening, listening

WAIT_S = 20.0


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT_S)).decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await asyncio.wait_for(reader.readexactly(int(headers.get("content-length", 0))), WAIT_S)
    return Reply(int(head[0].split()[1]), headers, body)


def post(body: bytes, kind: str = "application/x-npy", path: str = "/v1/infer", **headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Up:
    listening: Listening
    holder: Holder[Runtime]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.listening.http.removeprefix("unix:"))

    async def ask(self, request: bytes) -> Reply:
        reader, writer = await self.connect()
        try:
            writer.write(request)
            return await read_reply(reader)
        finally:
            writer.close()


@pytest.fixture
def runtime_of(tools: Any) -> Callable[..., Runtime]:
    """A runtime of release `version` whose model always gives label `answer`, or is `model`."""

    def make(version: int = 1, answer: int = 0, spec: Any = None, model: Any = None) -> Runtime:
        from fedge.inference import CompactModel

        spec = spec or tools.images
        data = tools.constant_model(answer, spec)
        entry, _ = tools.entry_of("micro", data)
        release = tools.release_of(version, (entry,), spec=spec)
        return Runtime(SimpleNamespace(release=release, entry=entry), model or CompactModel(data, spec))

    return make


@pytest.fixture
def up(tmp_path: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def start(holder: Holder[Runtime], grpc: bool = False, **limits: Any) -> AsyncIterator[Up]:
        http = Address.parse(f"unix:{tmp_path}/http.sock")
        rpc = Address.parse(f"unix:{tmp_path}/grpc.sock") if grpc else None
        async with listening(tmp_path, holder, Limits(**limits), http, rpc) as found:
            yield Up(found, holder)

    return start


@pytest.fixture(scope="session")
def wire() -> Any:
    return SimpleNamespace(post=post, read_reply=read_reply, wait_s=WAIT_S)
