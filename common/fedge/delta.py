"""What makes the bytes of one model file out of those of another: tensors by how far their numbers moved.

Between two rounds of training most codes of a quantised model stay, and the others move by little. So a
tensor that has a counterpart in the base (the same type and shape, in the same order) travels as differences:
of codes on a grid (`fedge.grids`), predicted from the base's values under the new scales, or of the numbers
themselves; their bytes go plane by plane through the coder of `fedge.entropy`, parted by whether the base has
a zero there. Everything else is deflated with what is left of the base as preset dictionary.

A delta needs no trust: who applies it compares the digest of what comes out. Whatever it holds, applying it
takes a few times the declared length in memory at most.
"""

from __future__ import annotations

import struct
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.entropy import Decoder, Symbols, encode
from fedge.errors import FormatError
from fedge.grids import MAX_LEVELS, grid, views
from fedge.onnx_layout import FLOAT32, Stored, stored_tensors
from fedge.varints import Reader, number

MAGIC: Final = b"FDL\x01"  # the last byte is the version
MAX_TENSORS: Final = 4096  # that travel as differences

_HEADER: Final = struct.Struct("<4sI")  # magic, length of the skeleton as stored
_SAME, _STEPS, _GRID = 0, 1, 2
_LEAST_BYTES = 64  # of a tensor, from which an entry of its own pays
_SLACK = 64 * 1024  # the skeleton may be so much longer than the file, for its table
_WINDOW = 32 * 1024  # of deflate's dictionary
_FLOATS: Final = frozenset({FLOAT32, 10, 11})  # data types of onnx.TensorProto: float, float16, double

_Numbers = npt.NDArray[Any]  # unsigned integers of a tensor's width
_Parts = list[tuple[Symbols, int]]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the table has it."""

    kind: int
    start: int  # of its counterpart in the base
    length: int  # bytes, of both
    width: int = 1  # _STEPS: bytes of a number
    is_float: bool = False  # _STEPS: numbers are compared as floats are
    shape: tuple[int, int, int] = (0, 0, 0)  # _GRID: (O, C, I)
    levels: int = 0  # _GRID: no |code| is larger, in base and file
    most: bytes = (
        b""  # the largest symbol of each plane; _GRID: of low and high bytes of scales, and of codes
    )

    @property
    def symbols(self) -> int:
        """How many it is coded in."""
        if self.kind == _SAME:
            return 0
        return self.length if self.kind == _STEPS else prod(self.shape) + 2 * self.shape[1]

    def to_bytes(self) -> bytes:
        """Its fields after the gap."""
        head = bytes([self.kind]) + number(self.start)
        if self.kind == _SAME:
            return head + number(self.length)
        if self.kind == _STEPS:
            return head + bytes([self.width, self.is_float]) + number(self.length // self.width) + self.most
        return head + b"".join(map(number, self.shape)) + bytes([self.levels]) + self.most


def make(base: bytes, new: bytes) -> bytes:
    """A delta from one file to another; the same files, the same bytes.

    Raises:
        FormatError: it does not give the file again, which is a fault of this module.
    """
    pairs = _pairs(base, new)[:MAX_TENSORS]
    table, literal, parts, at = [number(len(pairs))], [], [], 0
    for old, stored in pairs:
        entry, symbols = _coded(base, old, new, stored)
        table.append(number(stored.offset - at) + entry.to_bytes())
        literal.append(new[at : stored.offset])
        at = stored.offset + stored.length
        parts.extend(symbols)
    skeleton = b"".join((*table, *literal, new[at:]))
    short = _deflated(skeleton, _rest(base))
    made = _HEADER.pack(MAGIC, len(short)) + short + encode(parts)
    if apply(base, made, len(new)) != new:
        raise FormatError("delta: applying it would give other bytes; this is a fault of its maker")
    return made


def apply(base: bytes, delta: bytes, length: int) -> bytes:
    """The file of so many bytes that a delta makes of a base; the caller compares its digest.

    Raises:
        FormatError: truncated, damaged, for another base or length, or another version.
    """
    if len(delta) < _HEADER.size or delta[: len(MAGIC)] != MAGIC:
        raise FormatError(
            f"delta: begins with {delta[:4]!r}, not with {MAGIC!r}; a newer fedge may have made it"
        )
    _, stored = _HEADER.unpack_from(delta)
    if stored > len(delta) - _HEADER.size:
        raise FormatError(f"delta: a skeleton of {stored} bytes is truncated")
    short = delta[_HEADER.size : _HEADER.size + stored]
    skeleton = Reader(_inflated(short, _rest(base), length), "delta: the skeleton")
    table = _table(skeleton, len(base), length)
    whole = skeleton.left + sum(entry.length for _, entry in table)
    if whole != length:
        raise FormatError(f"delta: makes {whole} bytes, not the {length} declared")
    decoder = Decoder(delta[_HEADER.size + stored :], sum(entry.symbols for _, entry in table))
    pieces: list[bytes] = []
    for gap, entry in table:
        pieces.append(skeleton.take(gap))
        pieces.append(_decoded(entry, base[entry.start : entry.start + entry.length], decoder))
    decoder.close()
    return b"".join((*pieces, skeleton.take(skeleton.left)))


# --- the skeleton


def _rest(base: bytes) -> bytes:
    """The end of what lies between the base's tensors: what the new file's literal bytes are most like."""
    pieces, at = [], 0
    for stored in stored_tensors(base):
        if stored.length >= _LEAST_BYTES:
            pieces.append(base[at : stored.offset])
            at = stored.offset + stored.length
    return b"".join((*pieces, base[at:]))[-_WINDOW:]


def _deflated(skeleton: bytes, words: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zdict=words)
    return deflate.compress(skeleton) + deflate.flush()


def _inflated(short: bytes, words: bytes, length: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS, words)
    try:
        skeleton = inflate.decompress(short, length + _SLACK + 1)
    except zlib.error as error:
        raise FormatError(f"delta: the skeleton cannot be read ({error}); is it for this base?") from error
    if len(skeleton) > length + _SLACK:
        raise FormatError(f"delta: makes more than {length} bytes, the length declared")
    if not inflate.eof or inflate.unused_data:
        raise FormatError("delta: the skeleton is truncated, or followed by other bytes")
    return skeleton


def _table(skeleton: Reader, base: int, length: int) -> list[tuple[int, _Entry]]:
    """Each tensor with the number of literal bytes before it; all lie in the base and fit into the file."""
    count, left = skeleton.number(), length
    if count > MAX_TENSORS:
        raise FormatError(f"delta: {count} tensors, over {MAX_TENSORS}")
    table: list[tuple[int, _Entry]] = []
    for _ in range(count):
        gap, entry = skeleton.number(), _entry(skeleton)
        left -= gap + entry.length
        if left < 0 or entry.start + entry.length > base:
            raise FormatError(
                f"delta: the tensors take more than the {length} bytes declared, or the base has"
            )
        table.append((gap, entry))
    return table


def _entry(skeleton: Reader) -> _Entry:
    (kind,) = skeleton.take(1)
    start = skeleton.number()
    if kind == _SAME:
        return _Entry(_SAME, start, skeleton.number())
    if kind == _STEPS:
        width, is_float = skeleton.take(2)
        if width in (1, 2, 4, 8) and is_float <= (width > 1):
            length = width * skeleton.number()
            return _Entry(_STEPS, start, length, width, bool(is_float), most=skeleton.take(width))
    elif kind == _GRID:
        shape = (skeleton.number(), skeleton.number(), skeleton.number())
        (levels,) = skeleton.take(1)
        if prod(shape) and levels <= MAX_LEVELS:
            most = skeleton.take(3)
            return _Entry(_GRID, start, 4 * prod(shape), shape=shape, levels=levels, most=most)
    raise FormatError(
        f"delta: an entry of kind {kind} has a field out of range; a newer fedge may have made it"
    )


# --- tensors


def _pairs(base: bytes, new: bytes) -> list[tuple[Stored, Stored]]:
    """Each tensor of the new file with the next one of the base that has its type and shape."""
    waiting: dict[tuple[int, tuple[int, ...]], deque[Stored]] = defaultdict(deque)
    for stored in stored_tensors(base):
        waiting[stored.data_type, stored.shape].append(stored)
    found = []
    for stored in stored_tensors(new):
        others = waiting[stored.data_type, stored.shape]
        if stored.length >= _LEAST_BYTES and others:
            found.append((others.popleft(), stored))
    return found


def _coded(base: bytes, old: Stored, new: bytes, stored: Stored) -> tuple[_Entry, _Parts]:
    """The entry and the symbols of a tensor, in the form of fewest bits."""
    before = base[old.offset : old.offset + old.length]
    after = new[stored.offset : stored.offset + stored.length]
    if before == after:
        return _Entry(_SAME, old.offset, stored.length), []
    is_float = stored.data_type in _FLOATS
    forms = [_steps(_Entry(_STEPS, old.offset, stored.length, stored.itemsize, is_float), before, after)]
    if stored.data_type == FLOAT32:
        forms += _grids(old.offset, stored.shape, before, after)
    return min(forms, key=lambda form: sum(_bits(*part) for part in form[1]))


def _decoded(entry: _Entry, before: bytes, decoder: Decoder) -> bytes:
    if entry.kind == _SAME:
        return before
    return _stepped(entry, before, decoder) if entry.kind == _STEPS else _regridded(entry, before, decoder)


def _bits(symbols: Symbols, size: int) -> float:
    """About how many bits a run takes: its entropy, and half a logarithm for each symbol in use."""
    if not len(symbols):
        return 0.0
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    entropy = -float((counts * np.log2(counts / len(symbols))).sum())
    return entropy + (len(counts) - 1) / 2 * float(np.log2(len(symbols)))


def _steps(entry: _Entry, before: bytes, after: bytes) -> tuple[_Entry, _Parts]:
    """How far each number moved, as planes of bytes, first where the base is zero and then elsewhere."""
    old, new = (_ordered(entry, data) for data in (before, after))
    is_zero = _numbers(entry, before) == 0
    planes = _folded(new - old).astype(f"<u{entry.width}").view(np.uint8).reshape(-1, entry.width)
    most = planes.max(axis=0)
    parts = [
        (np.ascontiguousarray(planes[chosen, place]), int(most[place]) + 1)
        for place in range(entry.width)
        for chosen in (is_zero, ~is_zero)
    ]
    return replace(entry, most=most.tobytes()), parts


def _stepped(entry: _Entry, before: bytes, decoder: Decoder) -> bytes:
    old = _ordered(entry, before)
    is_zero = _numbers(entry, before) == 0
    planes = np.empty((len(old), entry.width), np.uint8)
    for place, most in enumerate(entry.most):
        for chosen in (is_zero, ~is_zero):
            planes[chosen, place] = decoder.take(int(np.count_nonzero(chosen)), most + 1)
    moved = _unfolded(planes.reshape(-1).view(f"<u{entry.width}"))
    return _disordered(entry, old + moved)


def _numbers(entry: _Entry, data: bytes) -> _Numbers:
    return np.frombuffer(data, f"<u{entry.width}")


def _ordered(entry: _Entry, data: bytes) -> _Numbers:
    """As unsigned integers in the order of the numbers; of floats: bits, negative ones turned round."""
    bits = _numbers(entry, data)
    if not entry.is_float:
        return bits
    top = bits.dtype.type(1 << 8 * entry.width - 1)
    return np.where(bits & top, ~bits, bits | top)


def _disordered(entry: _Entry, ordered: _Numbers) -> bytes:
    if not entry.is_float:
        return ordered.tobytes()
    top = ordered.dtype.type(1 << 8 * entry.width - 1)
    return np.where(ordered & top, ordered ^ top, ~ordered).astype(ordered.dtype).tobytes()


def _folded(moved: _Numbers) -> _Numbers:
    """Differences 0, -1, 1, -2, ... as 0, 1, 2, 3, ...: small ones have zeros in their high bytes."""
    signed = moved.view(f"<i{moved.dtype.itemsize}")
    folded: _Numbers = (moved << moved.dtype.type(1)) ^ (signed >> (8 * signed.dtype.itemsize - 1)).view(
        moved.dtype
    )
    return folded


def _unfolded(folded: _Numbers) -> _Numbers:
    one = folded.dtype.type(1)
    moved: _Numbers = (folded >> one) ^ -(folded & one)
    return moved


def _grids(
    start: int, shape: tuple[int, ...], before: bytes, after: bytes
) -> Iterator[tuple[_Entry, _Parts]]:
    """Every way in which both tensors lie on grids."""
    old, new = (np.frombuffer(data, "<f4") for data in (before, after))
    for view in views(shape):
        found, was = grid(new.reshape(view)), grid(old.reshape(view))
        if found is None or was is None:
            continue
        codes, scales = found
        if (codes * scales.astype("<f4")[:, None]).astype("<f4").tobytes() != after:
            continue  # a zero with a sign
        levels = int(max(np.abs(codes).max(), np.abs(was[0]).max()))
        entry = _Entry(_GRID, start, len(after), shape=view, levels=levels)
        moved = _folded(scales.view(np.uint16) - was[1].view(np.uint16))
        away = _around(codes - _predicted(entry, old, scales), levels)  # (O, C, I)
        planes = [moved.astype(np.uint8), (moved >> 8).astype(np.uint8), away]
        entry = replace(entry, most=bytes(int(plane.max()) for plane in planes))
        is_zero = was[0] == 0
        planes[2:] = [away[is_zero], away[~is_zero]]
        sizes = [entry.most[0] + 1, entry.most[1] + 1, *[entry.most[2] + 1] * 2]
        parts: _Parts = list(zip(planes, sizes, strict=True))
        yield entry, parts


def _around(away: npt.NDArray[np.int16], levels: int) -> Symbols:
    """Differences of codes, which wrap around, as 0, -1, 1, -2, ... to 0, 1, 2, 3, ... 2 levels."""
    size = 2 * levels + 1
    up = away % size
    return np.where(up <= levels, 2 * up, 2 * (size - up) - 1).astype(np.uint8)


def _back(symbols: Symbols) -> npt.NDArray[np.int16]:
    """The differences that `_around` was given, up to a turn."""
    half = ((symbols + np.int16(1)) >> 1).astype(np.int16)
    return np.where(symbols & 1, -half, half)


def _predicted(
    entry: _Entry, old: npt.NDArray[np.float32], scales: npt.NDArray[np.float16]
) -> npt.NDArray[np.int16]:
    """The base's values (O, C, I) as codes under the new scales (C,)."""
    step = scales.astype(np.float64)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = np.rint(old.reshape(entry.shape).astype(np.float64) / step)
    codes = np.nan_to_num(codes, nan=0.0, posinf=entry.levels, neginf=-entry.levels)
    return codes.clip(-entry.levels, entry.levels).astype(np.int16)


def _regridded(entry: _Entry, before: bytes, decoder: Decoder) -> bytes:
    old = np.frombuffer(before, "<f4")
    was = grid(old.reshape(entry.shape))
    if was is None or int(np.abs(was[0]).max()) > entry.levels:
        raise FormatError("delta: a tensor of the base is on no grid; it is for another base")
    low, high = (decoder.take(entry.shape[1], most + 1).astype(np.uint16) for most in entry.most[:2])
    scales = (was[1].view(np.uint16) + _unfolded(low | high << np.uint16(8))).view(np.float16)
    away = np.empty(entry.shape, np.int16)
    is_zero = was[0] == 0
    for chosen in (is_zero, ~is_zero):
        away[chosen] = _back(decoder.take(int(np.count_nonzero(chosen)), entry.most[2] + 1))
    codes = _predicted(entry, old, scales) + away
    levels = np.int16(entry.levels)
    codes = (codes + levels) % (2 * levels + 1) - levels
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is not finite: the digest refuses it
        values = (codes * scales.astype("<f4")[:, None]).astype("<f4")
    return bytes(values.tobytes())
