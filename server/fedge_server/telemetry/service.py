"""The Telemetry service: windows of the device whose certificate is on the connection, and of no other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc

from fedge.errors import FedgeError
from fedge.telemetry.window import MAX_WINDOWS
from fedge.wire.v1 import telemetry_pb2 as pb
from fedge.wire.v1 import telemetry_pb2_grpc
from fedge_server.hub.lanes import Few
from fedge_server.identity.admission import Peer
from fedge_server.monitoring.metrics import WINDOWS
from fedge_server.registry.devices import DeviceRow
from fedge_server.telemetry.store import Outcome, Sender, Telemetry

Admit = Callable[[Any], Awaitable[tuple[Peer, DeviceRow]]]
"""Who calls, and whether they may (`fedge_server.hub.gate.Gate.admit`)."""

Tags = Callable[[str], tuple[str, ...]]
"""The tags of a device, by its id."""

_MAX_REASON: Final = 256  # characters
_KINDS: Final = {
    "counted": pb.TelemetryReply.Outcome.COUNTED,
    "known": pb.TelemetryReply.Outcome.KNOWN,
    "refused": pb.TelemetryReply.Outcome.REFUSED,
}
_log = logging.getLogger("fedge.hub")


class TelemetryService(telemetry_pb2_grpc.TelemetryServicer):
    """Takes windows on a grpc.aio server; the database is asked in threads."""

    def __init__(self, admit: Admit, telemetry: Telemetry, tags: Tags = lambda _: ()) -> None:
        self._admit, self._telemetry, self._tags = admit, telemetry, tags
        self._few = Few(1)

    async def Report(self, request: pb.TelemetryRequest, context: Any) -> pb.TelemetryReply:  # noqa: N802
        """Take windows, each once."""
        peer, row = await self._admit(context)
        if len(request.windows) > MAX_WINDOWS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_WINDOWS} windows")
        sender = Sender(row.id, row.tier, self._tags(row.id))
        with self._few.one(peer.node_id) as allowed:
            if not allowed:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "one at a time; try again later")
            try:
                found = await asyncio.to_thread(self._telemetry.take, sender, list(request.windows))
            except FedgeError as error:  # the database: the device keeps its windows
                _log.error("telemetry cannot be kept: %s", error)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cannot be kept now; try again later")
        for outcome in found:
            WINDOWS.labels(outcome.kind).inc()
            if outcome.kind == "refused":
                _log.warning("device %s: %s", row.id[:8], outcome.reason)
        return pb.TelemetryReply(outcomes=[_said(outcome) for outcome in found])


def _said(outcome: Outcome) -> pb.TelemetryReply.Outcome:
    return pb.TelemetryReply.Outcome(kind=_KINDS[outcome.kind], reason=outcome.reason[:_MAX_REASON])
