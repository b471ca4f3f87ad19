"""A worker's calls to its hub: patient while the hub is away, and at an end when another worker took over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc

from fedge.errors import HubAwayError, RoundError, SupersededError
from fedge.wire import MAX_MESSAGE_BYTES
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1.admin_pb2_grpc import RunsStub

_log = logging.getLogger("fedge.worker")
T = TypeVar("T")

PATIENCE_S: Final = 600.0  # a hub may be away so long: an upgrade of its host fits in
_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts; then the last one again
_CALL_S: Final = 60.0  # of one attempt of a call that does not wait for devices

# What a hub that is restarting, or killed in the middle of a call, looks like.
_AWAY: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 4 * MAX_MESSAGE_BYTES),  # a Result, or the ids of a large fleet
    ("grpc.max_send_message_length", 64 * MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class Calls:
    """The Runs service for one session of one run."""

    def __init__(self, socket: Path, run_id: str, *, patience_s: float = PATIENCE_S) -> None:
        """Connect to the hub's socket and begin a session, which ends an older one of the run.

        Raises:
            RoundError: there is no hub, or it does not know the run.
        """
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._stub = RunsStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._patience_s = patience_s
        self.run_id = run_id
        reply = self._patiently(self._stub.Attach, admin.AttachRequest(run_id=run_id))
        self.session: str = reply.session
        self.default_deadline_s: float = reply.default_deadline_s

    def nodes(self, selection: admin.Selection, *, at_least: int, timeout_s: float) -> list[int]:
        """Node ids of suitable devices that are online; waits up to a time for so many."""
        request = admin.NodesRequest(
            run_id=self.run_id, selection=selection, at_least=at_least, timeout_s=timeout_s
        )
        return list(self._patiently(self._stub.Nodes, request, timeout_s + _CALL_S).node_ids)

    def push(self, request: admin.PushRequest) -> None:
        """Queue messages; again is no error."""
        request.run_id, request.session = self.run_id, self.session
        self._patiently(self._stub.Push, request)

    def close(self, message_ids: Sequence[str]) -> admin.CloseReply:
        """Wait for these messages no longer; tells what has travelled since the last call."""
        request = admin.CloseRequest(run_id=self.run_id, session=self.session, message_ids=message_ids)
        reply: admin.CloseReply = self._patiently(self._stub.Close, request)
        return reply

    def replies(self, message_ids: Callable[[], Sequence[str]], deadline: float) -> Iterator[admin.Reply]:
        """Answers as they arrive, until there are no more or the deadline has passed.

        Args:
            message_ids: those that are still waited for; asked again after a hub was away.
            deadline: by `time.monotonic`.
        """
        attempts = _Attempts(self._patience_s)
        while (left := deadline - time.monotonic()) > 0:
            request = admin.RepliesRequest(
                run_id=self.run_id, session=self.session, message_ids=message_ids()
            )
            stream = self._stub.Replies(request, timeout=left)
            try:
                for reply in stream:
                    attempts = _Attempts(self._patience_s)
                    yield reply
                return
            except grpc.RpcError as error:
                if _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() >= deadline:
                    return
                attempts.failed(error, until=deadline)
            finally:
                stream.cancel()

    def hang_up(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    def _patiently(self, call: grpc.UnaryUnaryMultiCallable, request: Any, timeout_s: float = _CALL_S) -> Any:
        attempts = _Attempts(self._patience_s)
        while True:
            # A worker is stopped by an exception in its main thread. Raised within a blocking call it can
            # leave the channel with a call that never ends, and closing the channel then waits for ever.
            under_way = call.future(request, timeout=timeout_s)
            try:
                return under_way.result()
            except grpc.RpcError as error:
                attempts.failed(error)
            finally:
                under_way.cancel()  # without effect on one that has ended


class _Attempts:
    """Failures in a row of one call: pauses between them, and an end to patience."""

    def __init__(self, patience_s: float) -> None:
        self._count = 0
        self._patience_s = patience_s
        self._end = time.monotonic() + patience_s

    def failed(self, error: grpc.RpcError, *, until: float = float("inf")) -> None:
        """Pause, at most until a time.

        Raises:
            SupersededError: another worker has begun a session of this run.
            HubAwayError: the hub has been away for too long.
            RoundError: it refuses the call.
        """
        code, details = _code(error), _details(error)
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            raise SupersededError(f"hub: {details}") from error
        if code not in _AWAY:
            raise RoundError(f"hub: refuses ({code.name}: {details})") from error
        now = time.monotonic()
        if now >= self._end:
            raise HubAwayError(f"hub: away for {self._patience_s:g} s ({details}); is it up?") from error
        if self._count == 0:
            _log.warning("the hub does not answer (%s); trying again", details)
        pause = _PAUSES_S[min(self._count, len(_PAUSES_S) - 1)]
        self._count += 1
        time.sleep(max(min(pause, until - now), 0.0))


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    with suppress(AttributeError):
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.UNKNOWN


def _details(error: grpc.RpcError) -> str:
    with suppress(AttributeError):
        return str(error.details())[:300]
    return type(error).__name__
