"""A Distribution service that does as a test says, over the folder of a repository."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from fedge.wire.v1 import distribution_pb2 as delivery_pb
from fedge.wire.v1.distribution_pb2_grpc import DistributionServicer

Lie = Callable[[bytes, int], AsyncIterator[bytes]]
"""What is sent in place of a file, given its bytes and the offset that was asked for."""


class StubDistribution(DistributionServicer):
    """Serves a repository's folder; says which version as a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 0  # what devices are told
        self.roles = (0, 0)  # newest root and tier's role
        self.polls: list[delivery_pb.PollRequest] = []
        self.reports: list[tuple[int, str, float]] = []
        self.fetched: list[tuple[str, int]] = []  # name, offset
        self.sent = 0  # bytes
        self.refuse_polls: grpc.StatusCode | None = None
        self.refuse_notes = False
        self.break_after = 0  # bytes of a model's stream; 0: never
        self.lies: dict[str, Lie] = {}  # by the end of a file's name, or "delta"

    async def Poll(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.polls.append(request)
        if self.refuse_polls:
            await context.abort(self.refuse_polls, "not now")
        end = time.monotonic() + request.wait_s
        while not self._is_news(request) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        version = self.version if self.version > request.has else 0
        return delivery_pb.PollReply(
            version=version, root=self.roles[0], tier_role=self.roles[1], again_s=0.1
        )

    def _is_news(self, request: Any) -> bool:
        new = self.version > request.has and self.version != request.told
        return new or 0 < request.root < self.roles[0] or 0 < request.tier_role < self.roles[1]

    async def Fetch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.fetched.append((request.name, request.offset))
        path = self.folder / request.name
        if not path.is_file():
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is none")
        data = path.read_bytes()
        for lie in [self.lies[end] for end in self.lies if request.name.endswith(end)]:
            async for part in self._told(lie, data, request.offset):
                yield part
            return
        for start in range(request.offset, len(data), 4096):
            if (
                self.break_after
                and request.name.endswith(".model")
                and start - request.offset >= self.break_after
            ):
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
            self.sent += len(data[start : start + 4096])
            yield delivery_pb.FilePart(data=data[start : start + 4096])

    async def FetchDelta(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.fetched.append((f"{request.base} to {request.version}", 0))
        if "delta" not in self.lies:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is none")
        async for part in self._told(self.lies["delta"], b"", 0):
            yield part

    async def _told(self, lie: Lie, data: bytes, offset: int) -> AsyncIterator[Any]:
        async for part in lie(data, offset):
            self.sent += len(part)
            yield delivery_pb.FilePart(data=part)

    async def Note(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.refuse_notes:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        kinds = delivery_pb.NoteReply.Outcome
        self.reports += [(report.version, report.kind, report.value) for report in request.reports]
        outcomes = [
            kinds(kind=kinds.REFUSED, reason="no")
            if report.kind == "unhealthy"
            else kinds(kind=kinds.COUNTED)
            for report in request.reports
        ]
        return delivery_pb.NoteReply(outcomes=outcomes)

    def kinds(self, version: int) -> set[str]:
        """What was reported of a version."""
        return {kind for of, kind, _ in self.reports if of == version}
