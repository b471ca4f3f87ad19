"""A model file as it travels: weights as small codes and a few scales, restored to the very same bytes.

Training on a grid leaves float32 weights that are code * scale, with a small integer code and a float16 scale
for each output channel. Such tensors travel as codes at the size of their entropy; other large tensors as
planes of bytes; everything else as it is. Whatever the file, unpacking gives its bytes again: that is checked
when it is packed. Nothing here needs onnx or torch: a device unpacks with numpy alone. The layout is in
docs/packed.md.

Shapes: a tensor is looked at as (O, C, I): one scale for each of C channels along one axis.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.entropy import MAX_ALPHABET, Decoder, Symbols, encode
from fedge.errors import FormatError
from fedge.grids import MAX_LEVELS, grid, views
from fedge.onnx_layout import FLOAT32, Stored, stored_tensors
from fedge.onnx_words import WORDS
from fedge.varints import Reader, number

MAGIC: Final = b"FPK\x01"  # the last byte is the version
MAX_TENSORS: Final = 4096  # that are not literal

_HEADER: Final = struct.Struct(
    "<4sII"
)  # magic, CRC-32 of the installed bytes, length of the skeleton as stored
_GRID, _PLANES = 0, 1
_LEAST_GRID, _LEAST_PLANES = 8, 1024  # elements on a grid, bytes in planes, from which it pays
_SURE_PLANES = 1024**2  # bytes in planes from which doing without is not even tried
_SLACK = 4096  # the skeleton may be so much longer than the file, for its table
_LOW = 7  # low bits of a float16 scale, which are 0 where it takes one byte
_FINE = (1 << _LOW) - 1  # these bits


@dataclass(frozen=True, slots=True)
class _Grid:
    """A tensor of float32 values code * scale, as the table has it."""

    shape: tuple[int, int, int]  # (O, C, I)
    levels: int  # no |code| is larger; 0 .. MAX_LEVELS
    scale_bytes: int  # 1 or 2 for each scale

    @property
    def length(self) -> int:
        """Bytes of the tensor in the file."""
        return 4 * prod(self.shape)

    @property
    def symbols(self) -> int:
        """How many its codes are."""
        return prod(self.shape)

    @property
    def scale_symbols(self) -> int:
        """How many its scales are."""
        return self.shape[1] * self.scale_bytes


@dataclass(frozen=True, slots=True)
class _Planes:
    """A tensor of any numbers: the first bytes of all, the second bytes of all, and so on."""

    width: int  # bytes of an element, 1 to 8
    elements: int

    @property
    def length(self) -> int:
        """Bytes of the tensor in the file."""
        return self.width * self.elements

    @property
    def symbols(self) -> int:
        """How many it is coded in."""
        return self.width * self.elements


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the file that is packed: where it lies, how, and with which content."""

    offset: int
    how: _Grid | _Planes
    scales: npt.NDArray[np.uint16]  # (C,) the bits of float16; none of planes
    parts: tuple[tuple[Symbols, int], ...]  # symbols and size of their alphabet

    @property
    def scale_bytes(self) -> int:
        """Bytes of each scale."""
        return self.how.scale_bytes if isinstance(self.how, _Grid) else 0


def is_packed(wire: bytes) -> bool:
    """Whether these bytes claim to be in this layout, of whatever version."""
    return wire[:3] == MAGIC[:3]


def pack(installed: bytes) -> bytes:
    """The file in this layout, with or without planes of bytes; the same file, the same bytes."""
    grids: list[_Piece] = []
    planes: list[_Piece] = []
    for stored in stored_tensors(installed):
        raw = installed[stored.offset : stored.offset + stored.length]
        piece = _on_grid(stored, raw)
        if piece is not None:
            grids.append(piece)
        elif stored.length >= _LEAST_PLANES:
            planes.append(_in_planes(stored, raw))
    both = sorted((*grids, *planes), key=lambda piece: piece.offset)
    wire = _stored(installed, both[:MAX_TENSORS])
    if planes and sum(piece.how.length for piece in planes) < _SURE_PLANES:
        wire = min(wire, _stored(installed, grids[:MAX_TENSORS]), key=len)
    if unpack(wire, len(installed)) != installed:
        raise FormatError("packed: unpacking would give other bytes; this is a fault of the packer")
    return wire


def unpack(wire: bytes, installed_bytes: int) -> bytes:
    """Undo `pack`; whatever the bytes, it takes four times `installed_bytes` of memory and a little at most.

    Raises:
        FormatError: truncated, damaged, trailing bytes, another length than declared, or another version.
    """
    if len(wire) < _HEADER.size or wire[: len(MAGIC)] != MAGIC:
        raise FormatError(
            f"packed: begins with {wire[:4]!r}, not with {MAGIC!r}; a newer fedge may have made it"
        )
    _, checksum, length = _HEADER.unpack_from(wire)
    if length > len(wire) - _HEADER.size:
        raise FormatError(f"packed: a skeleton of {length} bytes is truncated")
    stream = wire[_HEADER.size + length :]
    skeleton = Reader(
        _inflated(wire[_HEADER.size : _HEADER.size + length], installed_bytes), "packed: the skeleton"
    )
    table = _table(skeleton, installed_bytes)
    whole = skeleton.left + sum(how.length for _, how in table)
    if whole != installed_bytes:
        raise FormatError(f"packed: unpacks to {whole} bytes, not to the {installed_bytes} declared")
    grids = [how for _, how in table if isinstance(how, _Grid)]
    decoder = Decoder(
        stream, sum(how.symbols for _, how in table) + sum(grid.scale_symbols for grid in grids)
    )
    scales = iter(_scales(grids, decoder))
    pieces: list[bytes] = []
    for gap, how in table:
        pieces.append(skeleton.take(gap))
        values = (
            _on_values(how, next(scales), decoder) if isinstance(how, _Grid) else _of_planes(how, decoder)
        )
        pieces.append(values)
    decoder.close()
    result = b"".join((*pieces, skeleton.take(skeleton.left)))
    if zlib.crc32(result) != checksum:
        raise FormatError("packed: the bytes that come out are not those that were packed (CRC-32)")
    return result


def _stored(installed: bytes, pieces: Sequence[_Piece]) -> bytes:
    """Header, skeleton (table and literal bytes, deflated) and stream of scales and codes."""
    table, literal, at = [number(len(pieces))], [], 0
    for piece in pieces:
        table.append(number(piece.offset - at))
        literal.append(installed[at : piece.offset])
        at = piece.offset + piece.how.length
        if isinstance(piece.how, _Grid):
            sizes = b"".join(number(size) for size in piece.how.shape)
            table.append(bytes([_GRID]) + sizes + bytes([piece.how.levels, piece.how.scale_bytes]))
        else:
            table.append(bytes([_PLANES, piece.how.width]) + number(piece.how.elements))
    skeleton = b"".join((*table, *literal, installed[at:]))
    short = _deflated(skeleton)
    stream = encode([*_scale_parts(pieces), *(part for piece in pieces for part in piece.parts)])
    return _HEADER.pack(MAGIC, zlib.crc32(installed), len(short)) + short + stream


def _deflated(skeleton: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=WORDS)
    return deflate.compress(skeleton) + deflate.flush()


def _inflated(short: bytes, installed_bytes: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS, WORDS)
    most = installed_bytes + _SLACK
    try:
        skeleton = inflate.decompress(short, most + 1)
    except zlib.error as error:
        raise FormatError(f"packed: the skeleton cannot be read ({error})") from error
    if len(skeleton) > most:
        raise FormatError(f"packed: unpacks to more than {installed_bytes} bytes, the length declared")
    if not inflate.eof or inflate.unused_data:
        raise FormatError("packed: the skeleton is truncated, or followed by other bytes")
    return skeleton


def _table(skeleton: Reader, installed_bytes: int) -> list[tuple[int, _Grid | _Planes]]:
    """Each tensor with the number of literal bytes before it; all of them fit into the file.

    Raises:
        FormatError: a field is out of its range, or they do not fit.
    """
    count, left = skeleton.number(), installed_bytes
    if count > MAX_TENSORS:
        raise FormatError(f"packed: {count} tensors, over {MAX_TENSORS}")
    table: list[tuple[int, _Grid | _Planes]] = []
    for _ in range(count):
        gap, how = skeleton.number(), _entry(skeleton)
        left -= gap + how.length
        if left < 0:
            raise FormatError(f"packed: the tensors take more than the {installed_bytes} bytes declared")
        table.append((gap, how))
    return table


def _entry(skeleton: Reader) -> _Grid | _Planes:
    (kind,) = skeleton.take(1)
    if kind == _GRID:
        shape = (skeleton.number(), skeleton.number(), skeleton.number())
        levels, scale_bytes = skeleton.take(2)
        if prod(shape) and levels <= MAX_LEVELS and scale_bytes in (1, 2):
            return _Grid(shape, levels, scale_bytes)
    elif kind == _PLANES:
        (width,) = skeleton.take(1)
        elements = skeleton.number()
        if elements and 1 <= width <= 8:
            return _Planes(width, elements)
    raise FormatError(
        f"packed: an entry of kind {kind} has a field out of range; a newer fedge may have made it"
    )


def _scale_parts(pieces: Sequence[_Piece]) -> list[tuple[Symbols, int]]:
    """Two runs: the high bits of all scales, then the low bits of those that have them."""
    none = np.zeros(0, np.uint16)
    every = np.concatenate([none, *(piece.scales for piece in pieces)])
    fine = [piece.scales for piece in pieces if piece.scale_bytes == 2]
    low = np.concatenate([none, *fine]) & _FINE
    return [((every >> _LOW).astype(np.uint8), MAX_ALPHABET), (low.astype(np.uint8), _FINE + 1)]


def _scales(grids: Sequence[_Grid], decoder: Decoder) -> list[npt.NDArray[np.float32]]:
    """The scales (C,) of each grid, which the stream begins with: they are read before anything else is."""
    high = decoder.take(sum(each.shape[1] for each in grids), MAX_ALPHABET).astype(np.uint16) << _LOW
    low = decoder.take(sum(each.shape[1] for each in grids if each.scale_bytes == 2), _FINE + 1)
    scales, at, fine_at = [], 0, 0
    for each in grids:
        channels = each.shape[1]
        bits = high[at : at + channels]
        at += channels
        if each.scale_bytes == 2:
            bits = bits | low[fine_at : fine_at + channels]
            fine_at += channels
        scales.append(bits.view(np.float16).astype("<f4"))
    return scales


def _on_values(how: _Grid, scales: npt.NDArray[np.float32], decoder: Decoder) -> bytes:
    """The float32 values, little-endian."""
    codes = decoder.take(how.symbols, 2 * how.levels + 1).reshape(how.shape)
    values = codes.astype("<f4")
    values -= np.float32(how.levels)
    with np.errstate(invalid="ignore"):  # a scale that is not finite: the checksum refuses what comes out
        values *= scales[:, None]
    return values.tobytes()


def _of_planes(how: _Planes, decoder: Decoder) -> bytes:
    elements = np.empty((how.elements, how.width), np.uint8)
    for place in range(how.width):
        elements[:, place] = decoder.take(how.elements, MAX_ALPHABET)
    return elements.tobytes()


def _in_planes(stored: Stored, raw: bytes) -> _Piece:
    width = stored.itemsize
    elements = np.frombuffer(raw, np.uint8).reshape(-1, width)
    planes = tuple((np.ascontiguousarray(elements[:, place]), MAX_ALPHABET) for place in range(width))
    return _Piece(stored.offset, _Planes(width, len(elements)), np.zeros(0, np.uint16), planes)


def _on_grid(stored: Stored, raw: bytes) -> _Piece | None:
    """The tensor as codes and scales, by the axis of fewest bytes; None where they cannot give its bytes."""
    if stored.data_type != FLOAT32 or prod(stored.shape) < _LEAST_GRID:
        return None
    values = np.frombuffer(raw, "<f4")
    pieces = [_by_axis(values.reshape(shape), stored.offset) for shape in views(stored.shape)]
    return min((piece for piece in pieces if piece is not None), key=_estimate, default=None)


def _by_axis(values: npt.NDArray[np.float32], offset: int) -> _Piece | None:
    """The values (O, C, I) with one scale for each of C."""
    found = grid(values)
    if found is None:
        return None
    codes, scales = found
    if (codes * scales.astype("<f4")[:, None]).astype("<f4").tobytes() != values.tobytes():
        return None  # a zero with a sign
    levels = int(np.abs(codes).max())
    bits = scales.view(np.uint16)
    symbols = (codes.reshape(-1) + levels).astype(np.uint8)
    outer, channels, inner = values.shape
    how = _Grid((outer, channels, inner), levels, 2 if (bits & _FINE).any() else 1)
    return _Piece(offset, how, bits, ((symbols, 2 * levels + 1),))


def _estimate(piece: _Piece) -> float:
    """About how many bits a piece takes in the stream."""
    return 8 * len(piece.scales) * piece.scale_bytes + sum(_run_bits(*part) for part in piece.parts)


def _run_bits(symbols: Symbols, size: int) -> float:
    """The entropy, and what learning it costs: half the logarithm of the length for each symbol in use."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    entropy = -float((counts * np.log2(counts / len(symbols))).sum())
    learning = (len(counts) - 1) / 2 * float(np.log2(len(symbols)))
    return min(entropy + learning, len(symbols) * float(np.log2(size)))
