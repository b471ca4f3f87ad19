"""How the command line reaches a running hub: over its unix socket, or not at all when it is down."""

from __future__ import annotations

import time
from typing import Any, Final

import grpc

from fedge.errors import FedgeError
from fedge.files import is_held
from fedge.wire.v1 import admin_pb2 as pb
from fedge.wire.v1 import admin_pb2_grpc
from fedge_server.hub.home import Home

_CALL_S: Final = 3.0
_PATIENCE_S: Final = 10.0  # for a hub that is up and does not answer: it may be starting or stopping
_PAUSE_S: Final = 0.2


def refresh(home: Home) -> bool:
    """Tell the hub that the database has changed; False when none is up (it looks when it starts).

    Raises:
        FedgeError: a hub is up and does not answer.
    """
    return _ask(home, "Refresh", pb.RefreshRequest()) is not None


def status(home: Home) -> pb.StatusReply | None:
    """Devices online and workers; None when no hub is up.

    Raises:
        FedgeError: a hub is up and does not answer.
    """
    reply: pb.StatusReply | None = _ask(home, "Status", pb.StatusRequest())
    return reply


def is_up(home: Home) -> bool:
    """Whether a hub holds the home's lock."""
    return is_held(home.lock)


def _ask(home: Home, method: str, request: Any) -> Any:
    ends = time.monotonic() + _PATIENCE_S
    while True:
        error = None
        if home.socket.exists():
            with grpc.insecure_channel(f"unix:{home.socket}") as channel:
                stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]  # generated
                try:
                    return getattr(stub, method)(request, timeout=_CALL_S)
                except grpc.RpcError as caught:
                    error = caught
        if not is_up(home):
            return None
        if time.monotonic() > ends:
            why = f" ({error.code().name})" if error is not None else ""
            raise FedgeError(
                f"{home.root}: the hub is up and does not answer on {home.socket.name}{why}; what was "
                "written counts once it looks: restart it"
            ) from error
        time.sleep(_PAUSE_S)
