"""A real hub in this process, real certificates, real SQLite, and a device that speaks raw gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fedge.identity import device_id_of, node_id_of
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1 import link_pb2 as link
from fedge.wire.v1 import records_pb2 as records
from fedge.wire.v1.admin_pb2_grpc import AdminStub, RunsStub
from fedge.wire.v1.link_pb2_grpc import LinkStub
from fedge_server.hub.home import Home
from fedge_server.hub.server import Hub
from fedge_server.hub.settings import Settings
from fedge_server.identity.authority import Authority
from fedge_server.registry.database import Registry

WAIT_S = 10.0
TASK, DIGEST = "digits", "d" * 64


def csr_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Stream:
    """A device's Connect stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def read(self) -> link.HubMessage:
        message = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert message is not grpc.aio.EOF, (await self.call.code(), await self.call.details())
        return message

    async def work(self) -> link.Work:
        message = await self.read()
        assert message.WhichOneof("kind") == "work", message
        return message.work

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """The status with which the hub ends the stream."""

        async def drain() -> None:
            while await self.call.read() is not grpc.aio.EOF:
                pass

        try:
            await asyncio.wait_for(drain(), WAIT_S)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        return await self.call.code(), await self.call.details()

    def leave(self) -> None:
        self.call.cancel()


@dataclass
class Device:
    """A test device."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    roots: bytes
    port: Callable[[], int]
    channels: list[Any] = field(default_factory=list)

    @property
    def id(self) -> str:
        return device_id_of(self.key.public_key())

    @property
    def node_id(self) -> int:
        return node_id_of(self.id)

    def stub(self, *, anonymous: bool = False) -> LinkStub:
        pair = (None, None) if anonymous else (key_pem(self.key), self.certificate)
        credentials = grpc.ssl_channel_credentials(self.roots, *pair)
        channel = grpc.aio.secure_channel(
            f"localhost:{self.port()}", credentials, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.channels.append(channel)
        return LinkStub(channel)

    async def connect(self, stub: LinkStub | None = None, *, version: int = 2, **hello: Any) -> Stream:
        """Say Hello; the Welcome is the stream's first message."""
        call = (stub or self.stub()).Connect()
        values: dict[str, Any] = {"tasks": [link.OfferedTask(name=TASK, digest=DIGEST)], **hello}
        await call.write(link.DeviceMessage(hello=link.Hello(wire_version=version, **values)))
        return Stream(call)

    async def welcome(self, **hello: Any) -> Stream:
        stream = await self.connect(**hello)
        assert (await stream.read()).WhichOneof("kind") == "welcome"
        return stream


def answer_of(data: bytes = b"", *, name: str = "w", seconds: float = 0.1) -> records.Result:
    """A result with one uint8 tensor, or with none."""
    content = records.Content()
    if data:
        tensor = records.Tensor(name=name, dtype="uint8", shape=[len(data)])
        content.records.add(name="arrays", kind=records.Record.ARRAYS, tensors=[tensor])
        content.object.CopyFrom(records.Object(sha256=hashlib.sha256(data).digest(), size=len(data)))
    return records.Result(content=content, seconds=seconds)


async def submit(
    stub: LinkStub,
    message_id: str,
    result: records.Result | bytes,
    data: bytes = b"",
    *,
    offset: int = 0,
    step: int = 1000,
) -> link.SubmitReply:
    """Send an answer whole."""
    body = result if isinstance(result, bytes) else result.SerializeToString()

    async def parts() -> AsyncIterator[link.SubmitPart]:
        yield link.SubmitPart(header=link.SubmitHeader(message_id=message_id, result=body, offset=offset))
        for start in range(offset, len(data), step):
            yield link.SubmitPart(data=data[start : start + step])

    return await asyncio.wait_for(stub.Submit(parts()), WAIT_S)


class Rig:
    """A home, and the hub on it."""

    def __init__(self, root: Path, **limits: Any) -> None:
        self.home = Home(root)
        root.mkdir(parents=True, exist_ok=True)
        self.authority = Authority.create(self.home.ca)
        self.registry = Registry.open(root)
        self.settings = Settings.from_mapping(
            {
                "listen": {"host": "127.0.0.1", "link_port": 0, "enrolment_port": 0},
                "public": {"names": ["localhost"]},
                "limits": limits,
                "workers": {"restarts": 1},
            }
        )
        self.hub: Hub | None = None
        self.devices: list[Device] = []
        self._local: Any = None
        # What a worker does: wait, as one that ends has its run restarted, failed and forgotten.
        self.script = "import time; time.sleep(600)"
        self.session = ""

    async def up(self) -> Hub:
        self.hub = Hub(
            self.home,
            self.settings,
            self.registry,
            argv=lambda home, run: [sys.executable, "-c", self.script, str(home), run],
            first_backoff_s=0.01,
        )
        await self.hub.start()
        self._local = grpc.aio.insecure_channel(
            f"unix:{self.home.socket}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.runs, self.admin = RunsStub(self._local), AdminStub(self._local)
        return self.hub

    async def down(self) -> None:
        if self.hub is not None:
            await self._local.close()
            await self.hub.stop()
            self.hub = None

    async def close(self) -> None:
        for device in self.devices:
            for channel in device.channels:
                await channel.close()
        await self.down()
        self.registry.close()

    def device(self, *, hours: float = 24, tier: str = "micro", authority: Authority | None = None) -> Device:
        """A new device, enrolled."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (authority or self.authority).issue_device(csr_of(key), hours)
        device = Device(key, certificate, self.authority.bundle, self._port)
        self.devices.append(device)
        token = os.urandom(8).hex()
        self.registry.devices.create_token(
            token_id=token, secret_sha256="0" * 64, tier=tier, expires=time.time() + 60
        )
        self.registry.devices.enrol(
            device_id=device.id,
            node_id=device.node_id,
            public_key="",
            sealing_key="",
            tier=tier,
            token_id=token,
            fedge_version="0",
            wire_version=2,
            not_after=time.time() + 3600 * hours,
        )
        return device

    def _port(self) -> int:
        assert self.hub is not None
        return self.hub.link_port

    async def run(self, run_id: str = "run-1") -> str:
        """A run that this test is the worker of; returns the session."""
        self.registry.begin_run(run_id, task=TASK, seed=0, config={}, data="")
        reply = await self.runs.Attach(admin.AttachRequest(run_id=run_id))
        self.session = reply.session
        return reply.session

    async def push(
        self,
        *names: str,
        to: Device,
        data: bytes = b"",
        run_id: str = "run-1",
        deadline_s: float = 60.0,
        max_result_bytes: int = 100_000,
    ) -> None:
        content = answer_of(data).content
        if data:
            (self.home.objects(run_id) / content.object.sha256.hex()).write_bytes(data)
        await self.runs.Push(
            admin.PushRequest(
                run_id=run_id,
                session=self.session,
                task=TASK,
                task_digest=DIGEST,
                message_type="train",
                group_id="1",
                deadline_s=deadline_s,
                max_result_bytes=max_result_bytes,
                contents=[content],
                messages=[admin.Outgoing(message_id=name, node_id=to.node_id, content=0) for name in names],
            )
        )

    def replies(self, *names: str, run_id: str = "run-1") -> Any:
        return self.runs.Replies(admin.RepliesRequest(run_id=run_id, session=self.session, message_ids=names))

    async def all_replies(self, *names: str) -> dict[str, records.Result]:
        """The answers to these messages, once each of them has ended."""

        async def collect() -> dict[str, records.Result]:
            return {
                reply.message_id: records.Result.FromString(reply.result)
                async for reply in self.replies(*names)
            }

        return await asyncio.wait_for(collect(), WAIT_S)

    async def close_messages(self, *names: str, run_id: str = "run-1") -> admin.CloseReply:
        return await self.runs.Close(
            admin.CloseRequest(run_id=run_id, session=self.session, message_ids=names)
        )


async def until(condition: Callable[[], Any]) -> Any:
    """Wait, for a bounded time, until something holds."""
    ends = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < ends, "it never came true"
        await asyncio.sleep(0.01)
    return found


Scenario = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def hub(tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a hub that is up: `hub(scenario, offline_grace_s=1)`."""

    def play(scenario: Scenario, **limits: Any) -> None:
        async def main() -> None:
            async with up(tmp_path / "home", **limits) as rig:
                await scenario(rig)

        asyncio.run(main())

    return play


@asynccontextmanager
async def up(root: Path, **limits: Any) -> AsyncIterator[Rig]:
    rig = Rig(root, **limits)
    try:
        await rig.up()
        yield rig
    finally:
        await rig.close()


@pytest.fixture
def tools() -> Any:
    """Functions of this file."""

    class Tools:
        submit = staticmethod(submit)
        answer_of = staticmethod(answer_of)
        until = staticmethod(until)
        csr_of = staticmethod(csr_of)
        rig = Rig

    return Tools
