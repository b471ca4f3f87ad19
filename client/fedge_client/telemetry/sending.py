"""Sends closed windows until the server has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from fedge.errors import FormatError
from fedge.wire.v1 import telemetry_pb2 as pb

Report = Callable[[pb.TelemetryRequest], Awaitable[pb.TelemetryReply]]
"""The call, such as a stub's with a deadline; what it raises is for whoever made the connection."""


class Source(Protocol):
    """Where closed windows lie: a `Collector`, or `closing.Left` where another process counts."""

    def due(self, most: int) -> list[tuple[int, bytes]]:
        """Closed windows, oldest first: slot, and the bytes that travel."""

    def sent(self, slot: int) -> None:
        """The server has one, or refuses it for good."""


MOST: Final = 16  # windows of one call
_log = logging.getLogger("fedge.telemetry")


async def send(source: Source, report: Report) -> int:
    """Send what is due, in as many calls as it takes; how many windows the server has taken.

    A window is forgotten when the server has it, had it before, or will never take it.

    Raises:
        FormatError: the server answers for other windows than it was sent.
        Exception: whatever the call raises; what was not answered stays.
    """
    taken = 0
    while windows := await asyncio.to_thread(source.due, MOST):
        reply = await report(pb.TelemetryRequest(windows=[data for _, data in windows]))
        taken += await asyncio.to_thread(_settle, source, windows, reply)
    return taken


def _settle(source: Source, windows: Sequence[tuple[int, bytes]], reply: Any) -> int:
    kinds, taken = pb.TelemetryReply.Outcome, 0
    if len(reply.outcomes) != len(windows):
        raise FormatError(f"telemetry: {len(reply.outcomes)} outcomes of {len(windows)} windows")
    for (slot, _), outcome in zip(windows, reply.outcomes, strict=True):
        if outcome.kind not in (kinds.COUNTED, kinds.KNOWN, kinds.REFUSED):
            raise FormatError(f"telemetry: an outcome of kind {outcome.kind}; update this device")
        if outcome.kind == kinds.REFUSED:
            _log.warning("a window was refused: %s", outcome.reason[:200])
        taken += outcome.kind != kinds.REFUSED
        source.sent(slot)
    return taken
