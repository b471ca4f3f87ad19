"""The signer's unix socket: who may ask is decided by the kernel's word on the peer, before a byte is read.

One request and one reply on each connection. gRPC does not tell a Python server the user of its peer, so the
messages go over the socket as they are (`frames`); nothing else is served.
"""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedge.errors import FedgeError, FormatError, RefusedError, UserError
from fedge.logs import security
from fedge.wire.v1 import signer_pb2 as pb
from fedge_server.repository import Evidence, Request, public_pem
from fedge_server.repository.content import MAX_KEPT
from fedge_server.repository.signing import Sealed
from fedge_server.signer import frames
from fedge_server.signer.judging import Judge
from fedge_server.signer.memory import version_of

MAX_CONNECTIONS: Final = 8  # at a time; a further one waits
TIMEOUT_S: Final = 30.0  # for a peer that stalls
_MAX_PATH: Final = 107  # of a unix socket
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid

_log = logging.getLogger("fedge.signer")


@contextmanager
def serving(judge: Judge, path: Path, allowed: Collection[int]) -> Iterator[Server]:
    """A signer that listens; it serves in threads of its own until the end.

    Args:
        judge: that signs.
        path: of the socket, mode 0660; one that a killed signer left is replaced.
        allowed: users that may ask.

    Raises:
        UserError: the path cannot be used.
    """
    if len(os.fsencode(path)) > _MAX_PATH:
        raise UserError(f"{path}: too long for a unix socket (over {_MAX_PATH} bytes)")
    _free(path)
    before = os.umask(0o117)
    try:
        server = Server(judge, path, allowed)
    except OSError as error:
        raise UserError(f"{path}: cannot listen there ({error.strerror})") from error
    finally:
        os.umask(before)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        path.unlink(missing_ok=True)


def _free(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    if not path.exists():
        return
    if not path.is_socket():
        raise UserError(f"{path}: is there already, and no socket; choose another name")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        with suppress(OSError):
            probe.connect(str(path))
            raise UserError(f"{path}: another signer listens there")
    path.unlink(missing_ok=True)


class Server(socketserver.ThreadingUnixStreamServer):
    """Accepts, and asks the kernel who it is."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, judge: Judge, path: Path, allowed: Collection[int]) -> None:
        self.judge, self.allowed = judge, frozenset(allowed)
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(str(path), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve in a thread, once there is room for another."""
        self._room.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether the kernel says that the peer is a user who may ask."""
        packed = request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(packed)
        if uid not in self.allowed:
            security("signature_refused", "refused a connection of user %d", uid, user=uid, reason="user")
        return uid in self.allowed

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a connection ends with is no reason to end."""
        _log.exception("a connection failed")


class _Connection(socketserver.BaseRequestHandler):
    server: Server

    def handle(self) -> None:
        """One request, one reply."""
        self.request.settimeout(TIMEOUT_S)
        try:
            data = frames.receive(self.request, frames.MAX_REQUEST_BYTES)
            frames.send(self.request, answer(self.server.judge, data).SerializeToString())
        except (OSError, FormatError) as error:
            _log.warning("a connection ended early: %s", error)


def answer(judge: Judge, data: bytes) -> pb.SignerReply:
    """The reply to a request's bytes, whatever they are."""
    try:
        asked = pb.SignerRequest.FromString(data)
    except DecodeError:
        return pb.SignerReply(failure="the request is no message that this signer reads")
    try:
        if asked.WhichOneof("asked") == "describe":
            return pb.SignerReply(description=_description(judge))
        if asked.WhichOneof("asked") != "sign":
            return pb.SignerReply(failure="the request asks nothing that this signer knows; update it")
        return _signed(judge, asked.sign)
    except FedgeError as error:
        _log.error("%s", error)
        return pb.SignerReply(failure=str(error)[:4000])


def _description(judge: Judge) -> pb.SignerDescription:
    last = judge.memory.last()
    return pb.SignerDescription(
        tier=judge.tier,
        public_key=public_pem(judge.key).decode(),
        version=0 if last is None else version_of(last),
    )


def _evidence(given: pb.ReleaseEvidence) -> Evidence:
    sealed = Sealed(given.sealed.key, given.sealed.ciphertext) if given.HasField("sealed") else None
    return Evidence(given.manifest, given.report, given.golden, given.reference, sealed)


def _signed(judge: Judge, asked: pb.SignRole) -> pb.SignerReply:
    if len(asked.evidence) > MAX_KEPT:
        return pb.SignerReply(refusal=pb.SignRefusal(reasons=[f"evidence of over {MAX_KEPT} versions"]))
    evidence = {each.version: _evidence(each) for each in asked.evidence}
    previous = asked.previous if asked.HasField("previous") else None
    try:
        signature = judge.sign(Request(asked.role, asked.payload, previous, evidence))
    except RefusedError as error:
        about = {"role": asked.role[:60], "tier": judge.tier, "reason": "rules"}
        security("signature_refused", "refused %.60s: %s", asked.role, error, **about)
        return pb.SignerReply(refusal=pb.SignRefusal(reasons=[str(error)[:8000]]))
    version = version_of(asked.payload)
    signed = {"role": asked.role, "tier": judge.tier, "version": version}
    _log.info("signed %s version %d", asked.role, version, extra=signed)
    return pb.SignerReply(signed=pb.SignedRole(key_id=signature.keyid, signature=signature.signature))
