"""Who calls, and whether they may: asked at every call and for every message of a live stream."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

import grpc

from fedge.errors import FedgeError, IdentityError, RevokedError
from fedge_server.identity.admission import Peer, check, peer_of
from fedge_server.identity.authority import Authority
from fedge_server.monitoring import signals
from fedge_server.registry.devices import ACTIVE, DeviceRow, Devices

Context = grpc.aio.ServicerContext  # of a call

_REMEMBERED: Final = 4096  # certificates whose signature need not be checked again


class Gate:
    """Admission of devices, by their certificate and their row."""

    def __init__(
        self, authority: Authority, devices: Devices, clock: Callable[[], float] = time.time
    ) -> None:
        self._authority = authority
        self._devices = devices
        self._clock = clock
        self._peers: OrderedDict[tuple[str, bytes], Peer] = OrderedDict()
        self._rows: dict[str, DeviceRow] = {}  # as last read
        self._of_node: dict[int, str] = {}

    async def admit(self, context: Any) -> tuple[Peer, DeviceRow]:
        """The caller and its row, read anew; ends the call when it may not speak."""
        peer = None
        try:
            peer = self._peer(context)
            read = await asyncio.to_thread(self._devices.get, peer.device_id)
            row = self._remember(read) if read is not None else None
            check(peer, row, self._clock())
        except FedgeError as error:
            await refuse(context, error, peer)
        if row is None:  # check has refused it
            raise AssertionError
        return peer, row

    def still(self, peer: Peer) -> None:
        """Whether a device that was admitted may still speak; costs no database.

        Raises:
            RevokedError: it was revoked meanwhile, as `refresh` saw.
            IdentityError: its certificate has expired.
        """
        check(peer, self._rows.get(peer.device_id), self._clock())

    def is_gone(self, device_id: str) -> bool:
        """Whether a device that was admitted has been revoked meanwhile, as `refresh` saw."""
        row = self._rows.get(device_id)
        return row is None or row.status != ACTIVE

    async def refresh(self) -> None:
        """Read all rows again."""
        for row in await asyncio.to_thread(self._devices.all):
            self._remember(row)

    def _remember(self, read: DeviceRow) -> DeviceRow:
        """Keep a row that was just read, unless the device is known already as revoked.

        Two reads may end in the other order than they began; rows do not go, and a revocation is for good.
        """
        known = self._rows.get(read.id)
        row = read if known is None or known.status == ACTIVE else known
        self._of_node[row.node_id] = row.id
        self._rows[row.id] = row
        return row

    async def rows_of(self, node_ids: Iterable[int]) -> dict[int, DeviceRow]:
        """The devices behind node ids, read anew; those that nobody has enrolled are left out."""
        await self.refresh()
        found = {node_id: self._of_node.get(node_id) for node_id in node_ids}
        return {node_id: self._rows[name] for node_id, name in found.items() if name is not None}

    def _peer(self, context: Any) -> Peer:
        certificates = context.auth_context().get("x509_pem_cert")
        if not certificates:
            raise IdentityError("certificate: none was shown", "none")
        key = (self._authority.bundle_digest, bytes(certificates[0]))
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = peer_of(key[1], self._authority.certificates)
            while len(self._peers) > _REMEMBERED:
                self._peers.popitem(last=False)
        return peer


def status_of(error: FedgeError) -> grpc.StatusCode:
    """How an error of admission is told to a device."""
    if isinstance(error, RevokedError):
        return grpc.StatusCode.PERMISSION_DENIED
    if isinstance(error, IdentityError):
        return grpc.StatusCode.UNAUTHENTICATED
    return grpc.StatusCode.UNAVAILABLE


async def refuse(context: Any, error: FedgeError, peer: Peer | None = None) -> NoReturn:
    """End a call with what an error of admission means; `peer` is known where the certificate was read."""
    code = status_of(error)
    if isinstance(error, IdentityError):
        signals.certificate_refused(error, context.peer(), peer.device_id if peer else None)
    # What went wrong inside is for the log, not for whoever asks.
    await context.abort(code, str(error) if code != grpc.StatusCode.UNAVAILABLE else "try again later")
    raise AssertionError("abort raises")
