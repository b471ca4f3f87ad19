"""The cloud's Inference service with real certificates and the hub's own gate, here or in another process.

`python inference_site.py ROOT PORT` serves release 1, which always answers the second label, until killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fedge.identity import device_id_of, node_id_of
from fedge.spec import Spec
from fedge.wire.v1 import inference_pb2_grpc
from fedge.wire.v1.inference_pb2_grpc import InferenceStub
from fedge_server.hub.gate import Gate
from fedge_server.identity.authority import Authority
from fedge_server.inference.limits import Limits
from fedge_server.inference.models import Loaded, Models
from fedge_server.inference.service import InferenceServicer
from fedge_server.registry.database import Registry

SPEC = Spec("features", (2,), "float32", ("no", "yes"))


class Device:
    """Credentials as the agent's identity has them."""

    def __init__(self, authority: Authority, registry: Registry, tier: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
        self.certificate = authority.issue_device(request.public_bytes(serialization.Encoding.DER), 24.0)
        self.key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.bundle = authority.bundle
        self.id = device_id_of(key.public_key())
        token = os.urandom(8).hex()
        registry.devices.create_token(
            token_id=token, secret_sha256="0" * 64, tier=tier, expires=time.time() + 60
        )
        registry.devices.enrol(
            device_id=self.id,
            node_id=node_id_of(self.id),
            public_key="",
            sealing_key="",
            tier=tier,
            token_id=token,
            fedge_version="0",
            wire_version=2,
            not_after=time.time() + 86400,
        )


class Site:
    """A home with an authority and a registry, and what is up on it."""

    def __init__(self, root: Path) -> None:
        ca = root / "ca"
        self.authority = Authority.open(ca) if ca.exists() else Authority.create(ca)
        self.registry = Registry.open(root)
        self.gate = Gate(self.authority, self.registry.devices)
        self.port = 0

    def device(self, tier: str = "micro") -> Device:
        return Device(self.authority, self.registry, tier)

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @asynccontextmanager
    async def up(
        self,
        load: Callable[[int], Any],
        newest: Callable[[str], int] = lambda tier: 1,
        port: int = 0,
        **limits: Any,
    ) -> AsyncIterator[Models]:
        found = Limits(**limits)
        models = Models(load, newest, found)
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 4 * 1024**2)])
        servicer = InferenceServicer(self.gate, models, found)
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        key, chain = self.authority.issue_server(["localhost"], 1)
        credentials = grpc.ssl_server_credentials([(key, chain)], self.authority.bundle, True)
        self.port = server.add_secure_port(f"localhost:{port}", credentials)
        await server.start()
        try:
            yield models
        finally:
            await server.stop(None)
            models.close()

    @asynccontextmanager
    async def stub(self, device: Device) -> AsyncIterator[Any]:
        credentials = grpc.ssl_channel_credentials(device.bundle, device.key_pem, device.certificate)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            yield InferenceStub(channel)


def answers_yes(version: int) -> Loaded:
    """A release that answers the second label of `SPEC`."""

    def run(x: Any) -> Any:
        return np.tile(np.array([0.1, 0.9], np.float32), (len(x), 1))

    return Loaded(version, "c" * 64, "toy", SPEC, frozenset(["micro"]), run, 1)


async def _serve(root: Path, port: int) -> None:
    site = Site(root)
    async with site.up(answers_yes, port=port):
        print(site.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), int(sys.argv[2])))
