"""An update as bytes and back: version 1 of the format, and what a client keeps for its next one.

    2 bytes  "FU"           a document of this kind
    1 byte   1              the version
    1 byte   t
    t bytes  the codec      as `Codec.text`: what was asked for, or the update is refused
    the rest                a zlib stream of the body

The body: what travels as it is (`Layout.plain`); with topk four bytes n and n bytes of positions
(`positions.pack`); the values (`stages.written`). The rest of its length follows from the model, so nothing
much larger is ever unpacked. The Adler-32 at the stream's end finds what was damaged on the way.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.codecs import positions as places
from fedge.codecs import stages
from fedge.codecs.chain import Codec
from fedge.codecs.layout import Change, Layout, NamedArrays
from fedge.errors import FormatError

VERSION: Final = 1
_MAGIC: Final = b"FU"
_LENGTH: Final = struct.Struct("<I")  # n, of positions


@dataclass(frozen=True, slots=True)
class Coded:
    """What a client sends, and what stays."""

    data: bytes
    residual: Change | None  # of the change, unsent; None where the codec remembers nothing


def encode(
    arrays: NamedArrays, layout: Layout, codec: Codec, *, key: int, residual: Change | None = None
) -> Coded:
    """What an update says in few bytes; what it does not say is the residual.

    With feedback: sent = C(change + residual), next residual = change + residual - sent (Seide et al. 2014;
    Stich et al. 2018). So all that was sent and the last residual add up to all changes, whatever C is.
    Without, values that were drawn at random are divided by their share, which makes them right on average.

    Args:
        arrays: what the client would send whole; the origin's names and shapes.
        layout: what changes are measured from.
        codec: what is done.
        key: `stages.key_of` this client in this round.
        residual: what the last call left; None: nothing.

    Raises:
        ValueError: the change is not finite.
    """
    change = layout.change(arrays)
    if codec.remembers and residual is not None:
        change += residual
    if not np.isfinite(change).all():
        raise ValueError("training gave values that are not finite; nothing is sent")
    positions, values = _kept(change, codec, key)
    if codec.kept == "randomk" and not codec.feedback:
        values = values / np.float32(codec.share)
    said = stages.written(values, codec)
    body = layout.plain(arrays) + (_positions(positions) if codec.kept == "topk" else b"") + said
    text = codec.text.encode()
    data = _MAGIC + bytes((VERSION, len(text))) + text + _deflated(body, codec)
    if not codec.remembers:
        return Coded(data, None)
    _subtract(change, positions, stages.read(said, len(values), codec))
    return Coded(data, change)


def _kept(change: Change, codec: Codec, key: int) -> tuple[places.Positions | None, Change]:
    """Positions and their values; None: all."""
    count = codec.count(len(change))
    if codec.kept == "all" or not count:
        return None, change
    if codec.kept == "topk":
        positions = stages.largest(change, count)
    else:
        positions = stages.drawn(len(change), count, key)
    return positions, change[positions]


def _subtract(change: Change, positions: places.Positions | None, sent: Change) -> None:
    if positions is None:
        change -= sent
    else:
        change[positions] -= sent


def _positions(positions: places.Positions | None) -> bytes:
    data = b"" if positions is None else places.pack(positions)
    return _LENGTH.pack(len(data)) + data


def _deflated(body: bytes, codec: Codec) -> bytes:
    """As a zlib stream; bytes of a dense change have frequencies and runs, and nothing to search for."""
    dense = codec.kept == "all" and codec.values == "int8"
    stream = zlib.compressobj(
        6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE if dense else zlib.Z_DEFAULT_STRATEGY
    )
    return stream.compress(body) + stream.flush()


def checksum(arrays: NamedArrays) -> int:
    """CRC-32 of all values: tells states of one run apart, and protects from no forger."""
    found = 0
    for value in arrays.values():
        little = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        found = zlib.crc32(little.reshape(-1).view(np.uint8).data, found)
    return found


def estimated_bytes(origin: NamedArrays, codec: Codec) -> int:
    """About what an update of such a state takes, from above: as if zlib made nothing smaller."""
    layout = Layout.of(origin, origin)
    count = codec.count(layout.size)
    positions = count if codec.kept == "topk" else 0
    return layout.plain_bytes + positions + stages.written_bytes(count, codec)


def most_bytes(layout: Layout, codec: Codec) -> int:
    """What no update of this model in this codec exceeds."""
    body = _most_body(layout, codec)
    return body + body // 1000 + 1024  # zlib stores what it cannot compress


def _most_body(layout: Layout, codec: Codec) -> int:
    count = codec.count(layout.size)
    positions = _LENGTH.size + places.MOST * count if codec.kept == "topk" else 0
    return layout.plain_bytes + positions + stages.written_bytes(count, codec)


def decode(data: bytes, layout: Layout, codec: Codec, *, key: int) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays that an update stands for.

    Args:
        data: from a client; anything.
        layout: the client's own origin, names, shapes and dtypes.
        codec: that it was asked to use.
        key: `stages.key_of` that client in that round.

    Raises:
        FormatError: it is no such update, and why.
    """
    body = _inflated(data, layout, codec)
    plain, at = body[: layout.plain_bytes], layout.plain_bytes
    count = codec.count(layout.size)
    positions: places.Positions | None = None
    if codec.kept == "topk":
        positions, at = _read_positions(body, at, count, layout.size)
    elif codec.kept == "randomk":
        positions = stages.drawn(layout.size, count, key)
    if len(body) - at != stages.written_bytes(count, codec):
        raise FormatError(f"codec: {len(body)} bytes do not hold {count} values of {codec.values}")
    values = stages.read(body[at:], count, codec)
    if positions is not None:
        sparse, values = values, np.zeros(layout.size, np.float32)
        values[positions] = sparse
    return layout.arrays(values, plain)


def _inflated(data: bytes, layout: Layout, codec: Codec) -> bytes:
    """The body, of which no more is unpacked than there can be."""
    if len(data) > most_bytes(layout, codec):
        raise FormatError(f"codec: {len(data)} bytes, over the {most_bytes(layout, codec)} of this model")
    if len(data) < 4 or data[:2] != _MAGIC:
        raise FormatError("codec: not an update in a codec")
    if data[2] != VERSION:
        raise FormatError(f"codec: version {data[2]}; this server reads {VERSION}")
    said, wanted = data[4 : 4 + data[3]], codec.text
    if said != wanted.encode():
        shown = said.decode("ascii", "replace")
        raise FormatError(f"codec: the update is in {shown!r}, asked for was {wanted!r}")
    most = _most_body(layout, codec)
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data[4 + len(said) :], most + 1)
    except zlib.error as error:
        raise FormatError(f"codec: not a zlib stream ({error})") from error
    if len(body) > most or not stream.eof or stream.unused_data:
        raise FormatError(f"codec: the stream is truncated, has a tail, or holds more than {most} bytes")
    if len(body) < layout.plain_bytes:
        raise FormatError(f"codec: {len(body)} bytes, and {layout.plain_bytes} travel as they are")
    return body


def _read_positions(body: bytes, at: int, count: int, size: int) -> tuple[places.Positions, int]:
    if len(body) < at + _LENGTH.size:
        raise FormatError("codec: ends before its positions")
    (length,) = _LENGTH.unpack_from(body, at)
    at += _LENGTH.size
    if length > len(body) - at:
        raise FormatError(f"codec: {length} bytes of positions are declared, and {len(body) - at} came")
    return places.unpack(body[at : at + length], count, size), at + length
