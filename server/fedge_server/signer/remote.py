"""A key in a signer process, as a publisher sees it: `Signing` over the signer's unix socket."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from securesystemslib.signer import Key, Signature

from fedge.delivery import check_tier, target_path
from fedge.errors import FormatError, RefusedError, SignerAwayError
from fedge.wire.v1 import signer_pb2 as pb
from fedge_server.repository.keys import load_public
from fedge_server.repository.signing import Request
from fedge_server.signer import frames
from fedge_server.signer.memory import version_of

TIMEOUT_S: Final = 30.0


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


class RemoteSigning:
    """One signer; it is asked for its key when this is made."""

    def __init__(self, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
        """Ask who it is.

        Args:
            path: of its socket; for a signer elsewhere the end of a forwarded one.
            timeout_s: for each answer.

        Raises:
            SignerAwayError: nobody answers, or not as a signer does.
        """
        self.path, self._timeout_s = path, timeout_s
        described = self._ask(pb.SignerRequest(describe=pb.DescribeSigner()), "description").description
        try:
            self._key, self.tier = load_public(described.public_key.encode()), check_tier(described.tier)
        except FormatError as error:
            raise SignerAwayError(f"signer {path}: {error}") from error
        self.version = int(described.version)  # of the role's metadata that it signed last; 0: none

    @property
    def key(self) -> Key:
        """The public part."""
        return self._key

    def sign(self, request: Request) -> Signature:
        """A signature over the payload.

        Raises:
            RefusedError: the signer has reasons against it.
            SignerAwayError: it cannot be reached, or could not work.
        """
        asked = pb.SignRole(role=request.role, payload=request.payload, previous=request.previous)
        for version, found in request.evidence.items():
            each = asked.evidence.add(
                version=version,
                manifest=found.manifest,
                report=found.report,
                golden=found.golden,
                reference=found.reference,
            )
            if found.sealed is not None and not self._knows(request, version):
                each.sealed.key, each.sealed.ciphertext = found.sealed.key, found.sealed.ciphertext
        reply = self._ask(pb.SignerRequest(sign=asked), "signed", request.role)
        self.version = version_of(request.payload)
        return Signature(reply.signed.key_id, reply.signed.signature)

    def _knows(self, request: Request, version: int) -> bool:
        """Whether the signer has judged a release before, so that a large ciphertext need not be shown."""
        if request.previous is None or version_of(request.previous) != self.version:
            return False
        return target_path(self.tier, version, "model") in json.loads(request.previous)["targets"]

    def _ask(self, asked: pb.SignerRequest, wanted: str, role: str = "") -> pb.SignerReply:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                # A connection waits its turn only where the socket blocks; so the kernel keeps the time.
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._timeout_s))
                channel.connect(str(self.path))
                channel.settimeout(self._timeout_s)
                frames.send(channel, asked.SerializeToString())
                data = frames.receive(channel, frames.MAX_REPLY_BYTES)
            reply: pb.SignerReply = pb.SignerReply.FromString(data)
        except (OSError, FormatError, DecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise SignerAwayError(f"signer {self.path}: does not answer ({why})", role) from error
        found = reply.WhichOneof("answered")
        if found == "refusal":
            raise RefusedError(f"{role}: not signed: {'; '.join(reply.refusal.reasons)}", role)
        if found != wanted:
            why = reply.failure or f"it answered {found}"
            raise SignerAwayError(f"signer {self.path}: {why}", role)
        return reply

    def __repr__(self) -> str:
        return f"RemoteSigning({str(self.path)!r})"
