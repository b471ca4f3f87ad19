"""The distribution service as a device sees it: a fetcher of the repository's files, and three short calls.

Nothing that comes from here is trusted: `fedge_client.updater` holds all of it to signed metadata.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

import grpc

from fedge.errors import AbsentError, FedgeError, FetchError, ForbiddenError, FormatError, IdentityError
from fedge.wire import MAX_MESSAGE_BYTES, PING_MS, WIRE_VERSION
from fedge.wire.v1 import distribution_pb2 as pb
from fedge.wire.v1.distribution_pb2_grpc import DistributionStub
from fedge_client.agent.identity import Identity

CALL_S: Final = 30.0  # for a short call
STILL_S: Final = 30.0  # that a stream may bring nothing
GRACE_S: Final = 20.0  # that an answer to a Poll may be late
MAX_REPORTS: Final = 64  # of one Note

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # resume is ours
    ("grpc.use_local_subchannel_pool", 1),  # each Delivery connects anew
)

Kind = Literal["installed", "install_failed", "healthy", "unhealthy", "confidence", "latency_ms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a device says when it asks which version is for it."""

    has: int = 0  # version that is installed; 0: none
    told: int = 0  # of the last answer, whatever became of it
    tags: tuple[str, ...] = ()
    root: int = 0  # versions of metadata that it has verified; 0: it does not ask about them
    tier_role: int = 0

    def request(self, wait_s: float) -> pb.PollRequest:
        """The message."""
        return pb.PollRequest(
            wire_version=WIRE_VERSION,
            has=self.has,
            told=self.told,
            tags=self.tags,
            wait_s=wait_s,
            root=self.root,
            tier_role=self.tier_role,
        )


@dataclass(frozen=True, slots=True)
class Told:
    """The answer: hints, all of them."""

    version: int  # to be installed; 0: none now
    root: int  # newest versions of metadata
    timestamp: int
    tier_role: int
    again_s: float  # to wait before the next poll

    @classmethod
    def of(cls, reply: pb.PollReply) -> Self:
        """Read a message; a pause that cannot be is none."""
        again_s = reply.again_s if 0 <= reply.again_s <= 3600 else 60.0
        return cls(reply.version, reply.root, reply.timestamp, reply.tier_role, again_s)


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a version here."""

    version: int
    kind: Kind
    value: float = 1.0  # confidence, 0 to 1; latency_ms: milliseconds


@dataclass(frozen=True, slots=True)
class Refusal:
    """A report that the server will never take, and why."""

    report: Report
    reason: str


def note_request(reports: Sequence[Report]) -> pb.NoteRequest:
    """The message of some reports."""
    items = [pb.Report(version=each.version, kind=each.kind, value=each.value) for each in reports]
    return pb.NoteRequest(reports=items)


def refusals(reports: Sequence[Report], reply: pb.NoteReply) -> list[Refusal]:
    """Those that were refused; the others count.

    Raises:
        FormatError: there is not one outcome for each report.
    """
    if len(reply.outcomes) != len(reports):
        raise FormatError(f"note: {len(reply.outcomes)} outcomes for {len(reports)} reports")
    refused = pb.NoteReply.Outcome.REFUSED
    pairs = zip(reports, reply.outcomes, strict=True)
    return [Refusal(report, outcome.reason[:300]) for report, outcome in pairs if outcome.kind == refused]


class Delivery:
    """A connection of its own, made when it is first used; `with` ends it. Its calls block: use a thread.

    One that has carried a model keeps large buffers in the server: end it when the model is there.

    Args:
        identity: of the moment, asked when it connects.
    """

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity
        self._channel: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next call makes a new one."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def poll(self, standing: Standing, wait_s: float = 0.0) -> Told:
        """Which version is for this device; waits for so long at most where there is nothing new.

        Raises:
            FetchError: the server cannot be reached.
            IdentityError: it does not take this device's certificate.
        """
        with _ours("poll"):
            return Told.of(self._stub.Poll(standing.request(wait_s), timeout=wait_s + GRACE_S))

    def note(self, reports: Sequence[Report]) -> list[Refusal]:
        """Send reports, at most `MAX_REPORTS`; again where that fails: each counts once.

        Raises:
            FetchError, IdentityError: as `poll`.
        """
        with _ours("note"):
            return refusals(reports, self._stub.Note(note_request(reports), timeout=CALL_S))

    def fetch(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        """The `Fetcher` of `fedge_client.updater`: `metadata/...`, `targets/...`, and what belongs to them.

        `keys/TIER/VERSION/DEVICE` is the content key of a sealed version, wrapped for this device;
        `deltas/TIER/BASE/VERSION` what makes one version of another.
        """
        kind, _, rest = name.partition("/")
        if kind == "keys":
            yield self._key(name, _numbers(name, rest)[0])[offset:]
            return
        if kind == "deltas":
            base, version = _numbers(name, rest)
            call = self._stub.FetchDelta(pb.DeltaRequest(base=base, version=version))
        else:
            call = self._stub.Fetch(pb.FileRequest(name=name, offset=offset, maximum=maximum))
        with _watched(call) as touch:
            for part in call:
                touch()
                yield part.data

    def _key(self, name: str, version: int) -> bytes:
        with _ours(name):
            wrapped: bytes = self._stub.Key(pb.KeyRequest(version=version), timeout=CALL_S).wrapped
            return wrapped

    @property
    def _stub(self) -> Any:
        if self._channel is None:
            identity = self._identity()
            credentials = grpc.ssl_channel_credentials(
                identity.bundle, identity.key_pem, identity.certificate
            )
            self._channel = grpc.secure_channel(identity.hub.link_address, credentials, OPTIONS)
        return DistributionStub(self._channel)  # type: ignore[no-untyped-call]  # generated


def _numbers(name: str, rest: str) -> list[int]:
    """The versions in `TIER/VERSION/...`: those parts after the tier that are numbers."""
    found = [
        int(part) for part in rest.split("/")[1:] if part.isascii() and part.isdecimal() and len(part) < 11
    ]
    wanted = 2 if name.startswith("deltas/") else 1
    if len(found) < wanted:
        raise AbsentError(f"{name}: is no name of a file")
    return found[:wanted]


@contextmanager
def _watched(call: Any) -> Iterator[Callable[[], None]]:
    """Cancel a stream that stands still: gRPC's own deadline is for the whole of it, which may be long."""
    last, over = time.monotonic(), threading.Event()

    def touch() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        while not over.wait(max(last + STILL_S - time.monotonic(), 0.01)):
            if time.monotonic() - last >= STILL_S:
                call.cancel()
                return

    threading.Thread(target=watch, name="fedge-fetch-watch", daemon=True).start()
    try:
        yield touch
    finally:
        over.set()
        call.cancel()  # of no effect when it has ended; else the server need not send the rest


@contextmanager
def _ours(what: str) -> Iterator[None]:
    """What gRPC raises becomes an error of ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise explained(error, what) from error


def explained(error: Any, what: str) -> FedgeError:
    """An error of a call as one of ours: only the server's own word makes something absent or forbidden."""
    code, details = error.code(), " ".join((error.details() or "").split())[:200]
    if code is grpc.StatusCode.NOT_FOUND:
        return AbsentError(f"{what}: {details}")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return ForbiddenError(f"{what}: {details}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return IdentityError(f"{what}: {details}")
    return FetchError(f"{what}: cannot be done now ({code.name}: {details}); try again later")
