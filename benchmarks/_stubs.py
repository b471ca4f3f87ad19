"""A thousand devices in a process or two: real certificates and connections, no training.

A stub answers a training message by fetching the model and sending as many bytes back. `stubs` issues their
certificates with the server's own authority and writes their rows, to save the time of as many enrolments.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import _faults  # noqa: F401 - makes the next two importable
import grpc.aio
from devices import Identity, RawDevice, asked_tensors, update
from federation import Federation, wait_for

from fedge.task_digest import task_digest
from fedge.wire.v1 import link_pb2

AT_ONCE = 32  # connections that are being made at the same time
FILES = 16_384  # sockets and files that a process may need


def raise_file_limit() -> None:
    """A socket for each device needs more than the usual 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))


def register(federation: Federation, count: int) -> list[tuple[str, str]]:
    """Keys and certificates (PEM) of devices that the server's database knows from now on.

    Args:
        federation: set up, its hub not yet started: a hub reads its devices when it starts.
        count: how many.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    from fedge.identity import device_id_of, node_id_of
    from fedge_server.identity.authority import Authority
    from fedge_server.registry import schema
    from fedge_server.registry.database import Registry

    authority = Authority.open(federation.home / "ca")
    made, rows, now = [], [], time.time()
    for _ in range(count):
        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
        certificate = authority.issue_device(csr.public_bytes(Encoding.DER), 24)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        made.append((pem.decode(), certificate.decode()))
        device_id = device_id_of(key.public_key())
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        rows.append(
            {
                "id": device_id,
                "node_id": node_id_of(device_id),
                "tier": "edge",
                "public_key": public.decode(),
                "sealing_key": "00" * 32,
                "status": "active",
                "reason": "",
                "enrolled": now,
                "certificate_not_after": now + 24 * 3600,
                "wire_version": 2,
                "fedge_version": "0",
                "bundle": "",
            }
        )
    with Registry.open(federation.home) as registry, registry.engine.begin() as connection:
        connection.execute(schema.devices.insert(), rows)
    return made


@dataclass(slots=True)
class _Objects:
    """The bytes of each object once per process, however many devices fetch it."""

    kept: dict[bytes, asyncio.Future[list[bytes]]] = field(default_factory=dict)

    async def answer(self, device: RawDevice, work: link_pb2.Work) -> None:
        """Fetch, and send the same bytes back."""
        digest = work.content.object.sha256
        first = digest not in self.kept
        if first:
            self.kept = {digest: asyncio.get_running_loop().create_future()}
        future = self.kept[digest]
        try:
            # Only the first keeps what it fetches.
            chunks = [data async for data in device.fetch(work) if first]
        except BaseException as error:
            if first:
                future.set_exception(error)
                future.exception()  # nobody else may be waiting for it
            raise
        if first:
            future.set_result(chunks)
        result = update(asked_tensors(work), digest, work.content.object.size)
        await device.submit(work, result, _each(await future))


async def _each(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _serve(spec: Path) -> None:
    """Connect all devices of a spec and answer until stdin ends; says how many are connected."""
    wanted = json.loads(spec.read_text(encoding="utf-8"))
    objects, gate = _Objects(), asyncio.Semaphore(AT_ONCE)
    devices = [
        RawDevice(
            Identity(wanted["address"], key.encode(), certificate.encode(), wanted["ca"].encode()),
            {wanted["task"]: wanted["digest"]},
            objects.answer,
        )
        for key, certificate in wanted["devices"]
    ]

    async def run(device: RawDevice) -> None:
        await gate.acquire()
        free = [gate.release]

        def connected() -> None:
            while free:
                free.pop()()

        try:
            await device.serve(connected)
        except grpc.aio.AioRpcError as error:
            print(f"cut off: {error.code().name}: {error.details()}", flush=True)
        finally:
            connected()

    running = [asyncio.create_task(run(device)) for device in devices]
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    failures = [line for device in devices for line in device.failures]
    accepted = sum(
        reply.outcome == link_pb2.SubmitReply.ACCEPTED for device in devices for reply in device.outcomes
    )
    print(json.dumps({"accepted": accepted, "failures": len(failures), "such as": failures[:3]}), flush=True)


@contextlib.contextmanager
def stubs(
    federation: Federation, identities: Sequence[tuple[str, str]], task: str, processes: int = 2
) -> Iterator[list[int]]:
    """Stub devices, all connected; process ids of those that hold them.

    Args:
        federation: with its hub up.
        identities: of `register`.
        task: that they offer.
        processes: among which they are divided.
    """
    started = []
    for i in range(processes):
        spec = federation.folder / f"stubs-{i}.json"
        content = {
            "address": federation.link_address,
            "ca": "".join(path.read_text() for path in sorted((federation.home / "ca").glob("*.pem"))),
            "task": task,
            "digest": task_digest(task),
            "devices": identities[i::processes],
        }
        content["ca"] = _certificates(content["ca"])
        spec.write_text(json.dumps(content), encoding="utf-8")
        with (federation.folder / f"stubs-{i}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, __file__, spec], stdin=subprocess.PIPE, stdout=log, stderr=log
                )
            )
    try:
        wait_for(lambda: len(federation.online()) >= len(identities), "stubs are online", 120)
        yield [process.pid for process in started]
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda process: process.communicate(timeout=60), started))


def _certificates(pem: str) -> str:
    """The certificates of a PEM text, without keys that stand beside them."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return "".join(f"{begin}{part.partition(end)[0]}{end}\n" for part in pem.split(begin)[1:])


if __name__ == "__main__":
    raise_file_limit()
    asyncio.run(_serve(Path(sys.argv[1])))
