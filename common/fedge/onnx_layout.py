"""Where an ONNX file keeps its constants: a walk over protobuf's fields, without onnx.

It only finds places worth packing. What it does not understand it leaves out, so any bytes may be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

_GRAPH, _INITIALIZER = 7, 5  # fields of ModelProto and GraphProto
_DIMS, _DATA_TYPE, _RAW_DATA = 1, 2, 9  # fields of TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

FLOAT32: Final = 1
_SIZES: Final = {
    FLOAT32: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    10: 2,
    11: 8,
}  # bytes of an element, by data type


@dataclass(frozen=True, slots=True)
class Stored:
    """One constant's raw data within the file."""

    offset: int
    shape: tuple[int, ...]
    data_type: int  # of onnx.TensorProto
    itemsize: int  # bytes of an element

    @property
    def length(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * self.itemsize


def stored_tensors(installed: bytes) -> list[Stored]:
    """The constants whose raw data lies in the file, in its order; none where it is no ONNX model."""
    found: list[Stored] = []
    try:
        for field, start, end in _fields(installed, 0, len(installed)):
            if field == _GRAPH:
                for inner, first, last in _fields(installed, start, end):
                    stored = _tensor(installed, first, last) if inner == _INITIALIZER else None
                    if stored is not None:
                        found.append(stored)
    except ValueError:
        return []
    return found


def _tensor(data: bytes, start: int, end: int) -> Stored | None:
    shape: list[int] = []
    data_type, raw = 0, None
    for field, first, last in _fields(data, start, end):
        if field == _DIMS:  # packed or not, the values are varints side by side
            while first < last:
                size, first = _varint(data, first, last)
                shape.append(size)
        elif field == _DATA_TYPE:
            data_type, _ = _varint(data, first, last)
        elif field == _RAW_DATA:
            raw = (first, last)
    if raw is None or data_type not in _SIZES:
        return None
    stored = Stored(raw[0], tuple(shape), data_type, _SIZES[data_type])
    return stored if 0 < stored.length == raw[1] - raw[0] else None


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each field's number, and where its content begins and ends.

    Raises:
        ValueError: these are not protobuf's bytes.
    """
    while at < end:
        tag, at = _varint(data, at, end)
        kind, start = tag & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _BYTES:
            length, start = _varint(data, at, end)
            at = start + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("truncated")
        yield tag >> 3, start, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for place in range(10):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at
    raise ValueError("no varint")
