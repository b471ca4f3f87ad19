"""A hub that does as a test says, over real mutual TLS, and agents as real processes against it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from stub_distribution import StubDistribution

from fedge.identity import node_id_of
from fedge.task_digest import task_digest
from fedge.wire import CHUNK_BYTES
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1.distribution_pb2_grpc import add_DistributionServicer_to_server
from fedge.wire.v1.link_pb2_grpc import LinkServicer, add_LinkServicer_to_server
from fedge.wire.v1.records_pb2 import Content, Object, Record, Result
from fedge_client.agent import identity as device_identity
from fedge_server.identity.authority import Authority, ServerCertificate

WAIT_S = 150.0  # a busy machine takes half a minute to load torch


def wait_for(condition: Callable[[], Any], what: str = "", timeout_s: float = WAIT_S) -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what or condition}")


class StubHub(LinkServicer):
    """Keeps what devices say; sends what a test gives it."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create(folder / "ca")
        self.authority.ensure_server_certificate(folder / "tls", ["localhost"], 90)
        self.tls = ServerCertificate.load(folder / "tls")
        self.port = 0
        self.releases: StubDistribution | None = StubDistribution(folder.parent / "published")
        self.hellos: list[pb.Hello] = []
        self.objects: dict[bytes, bytes] = {}
        self.fetches: list[tuple[str, int]] = []  # message, offset
        self.answers: dict[str, tuple[Result, bytes]] = {}
        self.submits: list[tuple[str, int]] = []  # message, offset; also those that broke off
        self.parts: dict[str, bytes] = {}
        self.refuse: grpc.StatusCode | None = None  # every Connect ends with it
        self.refuse_submits = False  # answers break off at once
        self.break_submit_after = 0  # bytes; the call then breaks off, once
        self.break_fetch_after = 0  # likewise
        self.hang_fetch_after = 0  # bytes; the call then goes on no more
        self.turns: list[tuple[str, int]] = []  # message, kind
        self.not_yet = 0  # turns of a kind that a message is refused before one is granted
        self.closed: set[str] = set()  # messages whose answers nobody wants
        self.peers: dict[str, set[str]] = {}  # addresses that connections come from, by call
        self.outcome = pb.SubmitReply.ACCEPTED
        self.wire_version = 2
        self.bundle = b""
        self._streams: list[Any] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Any = None
        self.start()

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def start(self) -> None:
        self._do(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server(
            options=[("grpc.http2.min_ping_interval_without_data_ms", 10_000), ("grpc.so_reuseport", 0)]
        )
        add_LinkServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        if self.releases is not None:
            add_DistributionServicer_to_server(self.releases, self._server)  # type: ignore[no-untyped-call]
        credentials = grpc.ssl_server_credentials(
            [(self.tls.key, self.tls.chain)], self.authority.bundle, require_client_auth=True
        )
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        await self._server.start()

    def stop(self) -> None:
        self._do(self._server.stop(0))
        self._streams.clear()

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def Connect(self, requests: Any, context: Any) -> None:  # noqa: N802
        message = await context.read()  # before it refuses, as the hub does
        if self.refuse is not None:
            await context.abort(self.refuse, "device: revoked")
        self._seen("Connect", context)
        self.hellos.append(message.hello)
        welcome = pb.Welcome(
            wire_version=self.wire_version, server_time=time.time(), tier="micro", ca_bundle=self.bundle
        )
        queue: asyncio.Queue[pb.HubMessage] = asyncio.Queue()
        await context.write(pb.HubMessage(welcome=welcome))
        self._streams.append(queue)
        while True:
            await context.write(await queue.get())

    def _seen(self, call: str, context: Any) -> None:
        self.peers.setdefault(call, set()).add(context.peer())

    def connections(self) -> int:
        """How many are open now."""
        tables = [Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table.splitlines()]
        established = [line[1] for line in lines if line[3] == "01"]
        return sum(int(local.rpartition(":")[2], 16) == self.port for local in established)

    def send(self, message: pb.HubMessage) -> None:
        stream = wait_for(lambda: self._streams and self._streams[-1], "a device connects")
        self._loop.call_soon_threadsafe(stream.put_nowait, message)

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.Chunk]:  # noqa: N802
        self._seen("Fetch", context)
        self.fetches.append((request.message_id, request.offset))
        data = self.objects.get(request.sha256)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "message: closed")
        for start in range(request.offset, len(data), CHUNK_BYTES):
            if self.break_fetch_after and start >= self.break_fetch_after:
                self.break_fetch_after = 0
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            if self.hang_fetch_after and start >= self.hang_fetch_after:
                await asyncio.Event().wait()
            yield pb.Chunk(data=data[start : start + CHUNK_BYTES])

    async def Turn(self, request: pb.TurnRequest, context: Any) -> pb.TurnReply:  # noqa: N802
        self._seen("Turn", context)
        self.turns.append((request.message_id, request.kind))
        granted = self.turns.count(self.turns[-1]) > self.not_yet
        arrived = len(self.parts.get(request.message_id, b""))
        return pb.TurnReply(
            wanted=request.message_id not in self.closed,
            granted=granted,
            offset=arrived if request.kind == pb.TurnRequest.SUBMIT else 0,
        )

    async def Submit(self, requests: Any, context: Any) -> pb.SubmitReply:  # noqa: N802
        self._seen("Submit", context)
        header = (await context.read()).header
        self.submits.append((header.message_id, header.offset))
        if self.refuse_submits:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
        data = self.parts.get(header.message_id, b"")[: header.offset]
        while (part := await context.read()) is not grpc.aio.EOF:
            data += part.data
            self.parts[header.message_id] = data
            if self.break_submit_after and len(data) >= self.break_submit_after:
                self.break_submit_after = 0
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
        result = Result.FromString(header.result)
        assert len(data) == result.content.object.size
        self.answers[header.message_id] = (result, data)
        return pb.SubmitReply(outcome=self.outcome)

    def train(self, message: pb.HubMessage, data: bytes) -> None:
        """Offer the object and send the message."""
        self.objects[hashlib.sha256(data).digest()] = data
        self.send(message)

    def digest_of(self, name: str) -> str:
        """As the device that connected last says it."""
        return next(task.digest for task in self.hellos[-1].tasks if task.name == name)

    def answer(self, message_id: str, timeout_s: float = WAIT_S) -> tuple[Result, bytes]:
        return wait_for(lambda: self.answers.get(message_id), f"an answer to {message_id}", timeout_s)


class AgentProcess:
    """A device's home, and the agent that runs in it."""

    def __init__(self, home: Path, hub: StubHub) -> None:
        self.home, self.hub = home, hub
        folder = home / device_identity.FOLDER
        keys = device_identity.load_or_create_keys(folder)
        where = device_identity.Hub(
            f"localhost:{hub.port}", "localhost:1", keys.device_id, "micro", node_id_of(keys.device_id)
        )
        certificate = hub.authority.issue_device(keys.request(), 168)
        device_identity.commit(folder, keys, where, certificate, hub.authority.bundle)
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.write(tasks={"digits": {"data": "digits.npz"}})

    def write(self, tasks: dict[str, dict[str, Any]], **tables: dict[str, Any]) -> None:
        """Replace agent.toml."""
        lines = [f'[tasks."{name}"]\n{_lines(table)}' for name, table in tasks.items()]
        lines += [f"[{name}]\n{_lines(table)}" for name, table in tables.items()]
        (self.home / "agent.toml").write_text("\n".join(lines))
        tomllib.loads("\n".join(lines))

    def start(self, *options: str, wait: bool = True) -> None:
        before = len(self.hub.hellos)
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedge_client", "run", "--home", str(self.home), *options],
                stderr=log,
                stdout=log,
                env=os.environ | self.environment,
            )
        if wait:
            wait_for(lambda: len(self.hub.hellos) > before, "the agent says hello")

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def logged(self, words: str) -> None:
        wait_for(lambda: words in self.log, f"{words!r} in the log")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    @property
    def child(self) -> int | None:
        """Process id of the training process."""
        assert self.process is not None
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(found[0]) if found else None

    @property
    def status(self) -> dict[str, Any]:
        path = self.home / "agent-status.json"
        return dict(json.loads(path.read_text())) if path.exists() else {"state": "not written yet"}


def _lines(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StubHub]:
    made = StubHub(tmp_path / "server")
    yield made
    made.close()


@pytest.fixture
def agent(tmp_path: Path, hub: StubHub) -> Iterator[AgentProcess]:
    from sklearn.datasets import load_digits

    home = tmp_path / "device"
    home.mkdir()
    bunch = load_digits()
    np.savez(home / "digits.npz", x=bunch.images[:60].astype(np.uint8), y=bunch.target[:60])
    made = AgentProcess(home, hub)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


OWN_TASK = """
import os, time
from dataclasses import replace
from pathlib import Path
from fedge.tasks.digits import TASK as DIGITS

HOME = Path(__file__).parent
{top}

def read(source):
    (HOME / "reading").write_text(str(os.getpid()))
    {middle}
    while not (HOME / "go").exists():
        time.sleep(0.01)
    return DIGITS.read(source)

TASK = replace(DIGITS, name="own", read=read)
"""


@pytest.fixture
def own_task(agent: AgentProcess) -> Callable[..., Path]:
    """Let the device offer a task of its own that reads until the file `go` is there; gives that file."""

    def make(top: str = "", middle: str = "", **tables: Any) -> Path:
        (agent.home / "own.py").write_text(OWN_TASK.format(top=top, middle=middle))
        agent.write({"own:TASK": {"data": "digits.npz"}}, **tables)
        return agent.home / "go"

    return make


@pytest.fixture
def ping() -> Callable[..., pb.HubMessage]:
    """A query.ping; it may carry an object."""

    def make(message_id: str, data: bytes = b"", **changes: Any) -> pb.HubMessage:
        content = Content()
        if data:
            content.records.add(name="arrays", kind=Record.ARRAYS)
            content.records[0].tensors.add(name="w", dtype="uint8", shape=[len(data)])
            content.object.CopyFrom(Object(sha256=hashlib.sha256(data).digest(), size=len(data)))
        values: dict[str, Any] = {
            "message_id": message_id,
            "run_id": "run-1",
            "task": "digits",
            "task_digest": task_digest("digits"),
            "message_type": "query.ping",
            "group_id": "1",
            "content": content,
            "seconds_left": 600,
            "max_result_bytes": 10**9,
            "node_id": 7,
        }
        return pb.HubMessage(work=pb.Work(**(values | changes)))

    return make


@pytest.fixture
def training() -> Callable[..., tuple[pb.HubMessage, bytes]]:
    """A message that trains digits for an epoch, and its object's bytes."""

    def make(
        message_id: str, name: str = "digits", digest: str = "", model: str = "mlp", **changes: Any
    ) -> tuple[pb.HubMessage, bytes]:
        from flwr.app import RecordDict

        from fedge.config import Train
        from fedge.learning.messages import ARRAYS, CONFIG, Instructions, to_record
        from fedge.learning.state import arrays_of
        from fedge.task import Source, resolve
        from fedge.wire.records import pack

        task = resolve("digits")
        spec = task.read(Source()).spec
        digest = digest or task_digest("digits")
        instructions = Instructions(
            task=name,
            spec=spec,
            model=model,
            noise_filter="none",
            moments=None,
            train=Train(epochs=1),
            seed=1,
            update="weights",
            task_digest=digest,
        )
        arrays = arrays_of(task.model(model)(spec))
        packed = pack(RecordDict({ARRAYS: to_record(arrays), CONFIG: instructions.to_config()}))
        data = b"".join(bytes(part) for part in packed.buffers())
        packed.content.object.sha256 = hashlib.sha256(data).digest()
        work = pb.Work(
            message_id=message_id,
            run_id="run-1",
            task=name,
            task_digest=digest,
            message_type="train",
            group_id="1",
            content=packed.content,
            seconds_left=600,
            max_result_bytes=10**9,
            node_id=7,
        )
        for name, value in changes.items():
            setattr(work, name, value)
        return pb.HubMessage(work=work), data

    return make


@pytest.fixture
def wait() -> Callable[..., Any]:
    """Waits for a condition, with a bound."""
    return wait_for
