"""Messages on a stream: four bytes of length, big-endian, then the message; bounded, and never read ahead."""

from __future__ import annotations

import socket
import struct
from typing import Final

from fedge.errors import FormatError

MAX_REQUEST_BYTES: Final = 512 * 1024**2  # manifests, reports and new ciphertexts of all versions on offer
MAX_REPLY_BYTES: Final = 64 * 1024
_LENGTH: Final = struct.Struct(">I")
_PIECE: Final = 256 * 1024


def send(channel: socket.socket, message: bytes) -> None:
    """Write one message.

    Raises:
        OSError: the other side has gone, or takes too long.
    """
    channel.sendall(_LENGTH.pack(len(message)))
    channel.sendall(message)


def receive(channel: socket.socket, maximum: int) -> bytes:
    """Read one message; memory grows with what has come, not with what was announced.

    Raises:
        FormatError: it is announced longer than it may be, or ends before its length.
        OSError: the other side has gone, or takes too long.
    """
    (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
    if length > maximum:
        raise FormatError(f"signer: a message of {length} bytes, over the {maximum} it may have")
    return _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        piece = channel.recv(min(_PIECE, count - len(found)))
        if not piece:
            raise FormatError(f"signer: the connection ended after {len(found)} of {count} bytes")
        found += piece
    return bytes(found)
