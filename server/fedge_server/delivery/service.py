"""The Distribution service: which version is for a device, its files, its keys, and what became of it.

Nothing here decides what a device installs: metadata that others have signed does (`fedge.delivery`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import grpc

from fedge.errors import AbsentError, FedgeError, ForbiddenError, TrustError
from fedge.manifest import MAX_VERSION
from fedge.wire.v1 import distribution_pb2 as pb
from fedge.wire.v1 import distribution_pb2_grpc
from fedge_server.delivery.deltas import Deltas
from fedge_server.delivery.shelf import Shelf, View
from fedge_server.delivery.streams import STILL_S, Stream, Streams, read
from fedge_server.delivery.waiting import Waiting
from fedge_server.hub.gate import Gate, refuse
from fedge_server.hub.lanes import Few
from fedge_server.identity.admission import Peer
from fedge_server.monitoring import signals
from fedge_server.monitoring.metrics import DELIVERED_BYTES
from fedge_server.registry.devices import DeviceRow
from fedge_server.rollout.records import Standing
from fedge_server.rollout.reports import Report
from fedge_server.rollout.service import Rollouts

P = ParamSpec("P")
T = TypeVar("T")

Keys = Callable[[str, str, int], bytes | None]
"""The wrapped content key of a version for a device: device id, tier, version; None: it is not sealed."""

LOOK_S: Final = 1.0  # between looks for what other processes have published or decided
TICK_S: Final = 10.0  # between moments at which time alone changes rollouts
MAX_WAIT_S: Final = 600.0  # of a Poll
AGAIN_S, AGAIN_FULL_S = 5.0, 120.0  # before the next Poll, about; where no more may wait
MAX_TAGS: Final = 256
MAX_TEXT: Final = 256  # characters of a tag or a report's kind
MAX_NAME: Final = 512  # of a file
MAX_REPORTS: Final = 64  # of one Note
_THREADS: Final = 4
_AT_ONCE: Final = 2  # notes, keys and deltas of one device
_log = logging.getLogger("fedge.hub")


def no_keys(device: str, tier: str, version: int) -> bytes | None:
    """Where nothing is sealed."""
    return None


class Distribution(distribution_pb2_grpc.DistributionServicer):
    """Serves Distribution on a grpc.aio server with mutual TLS; the database is asked in threads."""

    def __init__(
        self,
        gate: Gate,
        rollouts: Rollouts,
        shelf: Shelf,
        *,
        keys: Keys = no_keys,
        deltas: Deltas | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._gate, self._rollouts, self._shelf, self._keys = gate, rollouts, shelf, keys
        self._deltas = deltas or Deltas(shelf)
        self._rng = rng or random.Random()  # noqa: S311 - spreads devices over time, protects nothing
        self._waiting, self._streams, self._few = Waiting(), Streams(), Few(_AT_ONCE)
        self._threads = ThreadPoolExecutor(_THREADS, "fedge-delivery")
        self._looking = asyncio.Lock()
        self._stands: dict[str, object] = {}
        self._view = View()
        self._standing: dict[str, Standing] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._ticked = time.monotonic()
        self._ending = False

    async def start(self) -> None:
        """Look at the repository and the rollouts, and go on doing so."""
        await self.look()
        self._tasks = [asyncio.create_task(self._keep_looking())]

    async def end(self) -> None:
        """Answer those who wait, and look no more: the hub stops."""
        self._ending = True
        self._waiting.end_of(self._waiting.devices())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Give back what calls needed, once there are none."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- what is new

    async def look(self) -> None:
        """See what others have published or decided, and tell those who wait for it."""
        async with self._looking:
            view = await self._in_thread(self._shelf.refresh)
            standing = await self._in_thread(self._rollouts.standing)
            tiers = view.tiers.keys() | standing.keys() | self._stands.keys()
            stands: dict[str, object] = {
                tier: (view.root, view.tiers.get(tier), standing.get(tier)) for tier in tiers
            }
            changed = {tier for tier in tiers if stands[tier] != self._stands.get(tier)}
            self._view, self._standing, self._stands = view, standing, stands
        if changed:
            self._waiting.wake(changed)

    @property
    def load(self) -> tuple[int, int]:
        """Devices that wait for news, and files under way."""
        return len(self._waiting), self._streams.open

    @property
    def offered(self) -> dict[str, int]:
        """The newest version on offer, by tier."""
        return {tier: self._view.newest(tier) for tier in self._view.tiers}

    def recheck(self) -> None:
        """Some devices may have been revoked: their calls end."""
        self._waiting.end_of({device for device in self._waiting.devices() if self._gate.is_gone(device)})

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if time.monotonic() - self._ticked > TICK_S:
                    self._ticked = time.monotonic()
                    await self._in_thread(self._rollouts.tick)
                await self.look()
            except FedgeError as error:
                _log.error("cannot look for releases: %s", error)

    # --- Poll

    async def Poll(self, request: pb.PollRequest, context: Any) -> pb.PollReply:  # noqa: N802
        """Which version is for the caller; answered when it is another than before, or time is up."""
        peer, row = await self._gate.admit(context)
        await self._check_poll(request, context)
        until = time.monotonic() + (min(request.wait_s, MAX_WAIT_S) if request.wait_s > 0 else 0.0)  # NaN: 0
        while True:
            seen = self._waiting.news(row.tier)
            reply = await self._reply(request, row, context)
            left = until - time.monotonic()
            if _is_news(reply, request) or left <= 0 or self._ending:
                reply.again_s = self._rng.uniform(0.0, AGAIN_S)
                return reply
            if not self._waiting.has_room(row.id):
                reply.again_s = self._rng.uniform(AGAIN_FULL_S / 2, AGAIN_FULL_S)
                return reply
            if await self._waiting.wait(row.tier, row.id, seen, left) and not self._ending:
                await asyncio.sleep(self._rng.uniform(0.0, self._waiting.spread_s()))
            await self._still(peer, context)

    async def _check_poll(self, request: pb.PollRequest, context: Any) -> None:
        if len(request.tags) > MAX_TAGS or any(len(tag) > MAX_TEXT for tag in request.tags):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"more than {MAX_TAGS} tags, or one of more than {MAX_TEXT} characters",
            )
        if max(request.has, request.told) > MAX_VERSION:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a version that cannot be")

    async def _reply(self, request: pb.PollRequest, row: DeviceRow, context: Any) -> pb.PollReply:
        version = await self._asked(
            context, self._version_for, row.id, row.tier, request.has, tuple(request.tags)
        )
        view = self._view
        role = view.tiers[row.tier].role if row.tier in view.tiers else 0
        return pb.PollReply(version=version, root=view.root, timestamp=view.timestamp, tier_role=role)

    def _version_for(self, device: str, tier: str, has: int, tags: tuple[str, ...]) -> int:
        """What rollouts say; the newest release where the tier never had one. Never what is not on offer."""
        view, standing = self._view, self._standing.get(tier)
        if standing is not None and standing.channel.rollout:
            offered = self._rollouts.offer(device, has, tags)
        else:
            offered = view.newest(tier)
        if offered is None or offered <= has:
            return 0
        if not view.offers(tier, offered):
            _log.warning("version %d is for tier %s, but its metadata does not list it", offered, tier)
            return 0
        return offered

    # --- Fetch

    async def Fetch(  # noqa: N802 - the wire's name
        self, request: pb.FileRequest, context: Any
    ) -> None:
        """A file of the repository, from an offset on."""
        peer, row = await self._gate.admit(context)
        with self._streams.one(row.id) as stream:
            if stream is None:
                await self._too_many(context)
            descriptor, size = await self._open(request.name, row.tier, context)
            try:
                if request.offset > size:
                    await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the file has {size} bytes")
                end = min(size, request.offset + request.maximum) if request.maximum else size
                await self._send(descriptor, (request.offset, end), stream, peer, context)
            finally:
                os.close(descriptor)

    async def _open(self, name: str, tier: str, context: Any) -> tuple[int, int]:
        if len(name) > MAX_NAME:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a name of over {MAX_NAME} characters")
        return await self._asked(context, self._shelf.open, name, tier)

    async def _send(
        self, descriptor: int, span: tuple[int, int], stream: Stream, peer: Peer, context: Any
    ) -> None:
        """The bytes of a span, each chunk when the device has room for it."""
        offset, end = span
        while offset < end:
            data = await read(descriptor, min(stream.next_bytes(), end - offset), offset)
            if not data:
                _log.error("a file of the repository has become shorter while it was read")
                return  # its digest will not be right, and the device says so
            await self._still(peer, context)
            try:
                async with asyncio.timeout(STILL_S):
                    await context.write(pb.FilePart(data=data))
            except (
                TimeoutError
            ):  # its last chunk, and this stream's place, are kept until it reads on or leaves
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing was taken for {STILL_S:g} s")
            offset += len(data)
            DELIVERED_BYTES.inc(len(data))

    async def FetchDelta(  # noqa: N802 - the wire's name
        self, request: pb.DeltaRequest, context: Any
    ) -> None:
        """What makes the bytes of one version out of those of another."""
        peer, row = await self._gate.admit(context)
        with self._streams.one(row.id) as stream:
            if stream is None:
                await self._too_many(context)
            try:
                found = await self._deltas.open(row.tier, request.base, request.version)
            except FedgeError as error:
                _log.error("no delta of tier %s from %d: %s", row.tier, request.base, error)
                found = None
            if found is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "there is none; fetch the whole")
                raise AssertionError("abort raises")
            descriptor, size = found
            try:
                await self._send(descriptor, (0, size), stream, peer, context)
            finally:
                os.close(descriptor)

    # --- Key and Note

    async def Key(self, request: pb.KeyRequest, context: Any) -> pb.KeyReply:  # noqa: N802
        """The content key of a sealed version, wrapped for the caller."""
        peer, row = await self._gate.admit(context)
        with self._few.one(peer.node_id) as allowed:
            if not allowed:
                await self._too_many(context)
            if not self._view.offers(row.tier, request.version):
                await context.abort(grpc.StatusCode.NOT_FOUND, "the version is not on offer for this tier")
            wrapped = await self._asked(context, self._keys, row.id, row.tier, request.version)
            if wrapped is None:
                await context.abort(grpc.StatusCode.NOT_FOUND, "the version is not sealed")
            return pb.KeyReply(wrapped=wrapped)

    async def Note(self, request: pb.NoteRequest, context: Any) -> pb.NoteReply:  # noqa: N802
        """What became of versions on the caller, each report once."""
        peer, row = await self._gate.admit(context)
        if len(request.reports) > MAX_REPORTS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than {MAX_REPORTS} reports")
        with self._few.one(peer.node_id) as allowed:
            if not allowed:
                await self._too_many(context)
            outcomes = [await self._asked(context, self._noted, row.id, report) for report in request.reports]
        return pb.NoteReply(outcomes=outcomes)

    def _noted(self, device: str, report: pb.Report) -> pb.NoteReply.Outcome:
        kinds = pb.NoteReply.Outcome
        try:
            new = self._rollouts.note(Report(device, report.version, report.kind[:MAX_TEXT], report.value))
        except TrustError as error:  # this device's fault alone
            signals.report_refused(device, error)
            return kinds(kind=kinds.REFUSED, reason=str(error)[:MAX_TEXT])
        if new:
            signals.reported(device, report.version, report.kind)
        return kinds(kind=kinds.COUNTED if new else kinds.KNOWN)

    # --- what all share

    async def _still(self, peer: Peer, context: Any) -> None:
        try:
            self._gate.still(peer)
        except FedgeError as error:
            await refuse(context, error, peer)

    async def _too_many(self, context: Any) -> NoReturn:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many at once; try again later")
        raise AssertionError("abort raises")

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))

    async def _asked(self, context: Any, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same on behalf of a device, who is told what it needs to know of an error."""
        try:
            return await self._in_thread(work, *args, **kwargs)
        except AbsentError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ForbiddenError as error:
            signals.foreign_request(None, str(error))
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except FedgeError as error:
            _log.error("%s: %s", getattr(work, "__name__", work), error)
            await refuse(context, error)
        raise AssertionError("abort raises")


def _is_news(reply: pb.PollReply, request: pb.PollRequest) -> bool:
    """Whether a device hears something that it has not heard: the answer, or newer metadata."""
    return bool(
        (reply.version and reply.version != request.told)
        or 0 < request.root < reply.root
        or 0 < request.tier_role < reply.tier_role
    )
