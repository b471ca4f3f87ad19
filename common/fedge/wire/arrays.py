"""Flower arrays that hold no serialised copy: one in memory, one still in a file.

`flwr.app.Array` keeps `.npy` bytes and decodes them at each use. These two hand out numpy arrays directly
and make `.npy` bytes only for somebody who asks for `.data`. `ArrayRecord(mapping)` rebuilds plain arrays
from `.data`, so put these in with `record[name] = array`.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedge.errors import FormatError
from fedge.wire import npy

R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
V = TypeVar("V")
PIECE_BYTES: Final = 4 * 1024**2  # of a large array that is read in pieces
_LITTLE: Final = "<|=" if sys.byteorder == "little" else "<|"  # of numpy's byte orders
_NPY: Final = "numpy.ndarray"  # Flower's name for `.npy` bytes


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    """Numpy puts a name together anew at each use."""
    return str(dtype.name)


class DirectArray(Array):
    """What both share: `.data` is made on demand, and nothing is kept of it."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=_NPY)  # past Flower's own setter, which is slow

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field there, made on demand here
        """The array as `.npy` bytes, made anew at each call."""
        buffer = io.BytesIO()
        np.save(buffer, self.numpy(), allow_pickle=False)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.dtype}, {self.shape})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape) == (other.dtype, other.shape) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # as in Flower's dataclass

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class MemoryArray(DirectArray):
    """An array that stays as it is in memory."""

    def __init__(self, value: npt.NDArray[Any], *, shared: bool = True) -> None:
        """Hold a value; `shared=False` when nobody else uses it, so that `numpy` may hand it out writable."""
        if shared and value.flags.writeable:
            value = value.view()
            value.flags.writeable = False
        self.__dict__.update(
            dtype=_name_of(value.dtype), shape=value.shape, stype=_NPY, value=value, shared=shared
        )

    def numpy(self) -> npt.NDArray[Any]:
        """The values, without a copy; not writable when others may hold the same array.

        All who ask for a shared array get the same object, so that it can be told that they did.
        """
        value: npt.NDArray[Any] = self.__dict__["value"]
        return value if self.__dict__["shared"] else value.view()

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.__dict__["value"].nbytes)


class FileArray(DirectArray):
    """An array whose raw little-endian bytes lie in a file; nothing is read before it is asked for."""

    def __init__(self, path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self.__dict__.update(path=path, offset=offset)

    def numpy(self) -> npt.NDArray[Any]:
        """The values, read into a fresh array; nothing is kept of them.

        Raises:
            FormatError: the file is gone or too short, or a bool is neither 0 nor 1.
        """
        return self._read(0, self.shape)

    def piece(self, start: int, count: int) -> npt.NDArray[Any]:
        """`count` values from position `start` on, in C order and one dimension; errors as in `numpy`."""
        return self._read(start, (count,))

    def _read(self, start: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        value = np.empty(shape, np.dtype(self.dtype).newbyteorder("<"))
        path, offset = self.__dict__["path"], self.__dict__["offset"] + start * value.itemsize
        if value.nbytes:
            _read_into(value.reshape(-1).view(np.uint8).data, path, offset)
        if value.dtype == np.bool_ and value.size and value.view(np.uint8).max() > 1:
            raise FormatError(f"tensor at {offset} of {path.name}: bool, but holds other values than 0 and 1")
        return value.astype(value.dtype.newbyteorder("="), copy=False)


class ObjectRecord(ArrayRecord):
    """Arrays of an object that has travelled; whoever received its bytes has checked their digest."""

    @classmethod
    def of(cls, sha256: bytes) -> ObjectRecord:
        """An empty record that the object's arrays are put into.

        Args:
            sha256: of the little-endian bytes of all arrays that came with these, one after the other; empty
                where nobody knows it.
        """
        record = cls()
        record.__dict__["sha256"] = sha256
        return record

    @property
    def sha256(self) -> bytes:
        """The object's; empty where nobody knows it, or other arrays have taken the place of its own."""
        found: bytes = self.__dict__["sha256"]
        return found if all(isinstance(array, FileArray) for array in self.values()) else b""


# Flower names an object's type by its class when it sends it: on a SuperLink these travel as plain arrays.
MemoryArray.__qualname__ = FileArray.__qualname__ = Array.__qualname__
ObjectRecord.__qualname__ = ArrayRecord.__qualname__


def _read_into(view: memoryview, path: Path, offset: int) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                count = os.preadv(handle, [view], offset)
                if count == 0:
                    raise FormatError(f"{path.name}: ends {len(view)} bytes before its tensor does")
                view, offset = view[count:], offset + count
        finally:
            os.close(handle)
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror})") from error


def records_of(content: RecordDict, kind: type[R]) -> dict[str, R]:
    """The records of one kind by name.

    Flower's `array_records`, `metric_records` and `config_records` each make a table that refers to itself
    and to the whole content: all arrays of the message would stay in memory until the garbage collector comes
    by, one model more in every round.
    """
    # Not `isinstance`, which asks abstract base classes for each record that is of another kind.
    found: dict[str, Any] = {n: r for n, r in table_of(content).items() if kind in type(r).__mro__}
    return found


@overload
def table_of(record: RecordDict) -> Mapping[str, ArrayRecord | ConfigRecord | MetricRecord]: ...
@overload
def table_of(record: Mapping[str, V]) -> Mapping[str, V]: ...
def table_of(record: Any) -> Any:
    """What a record, or a dict, holds, to be read.

    Past Flower's own accessors, each of which goes through several calls of Python: a third of what looking
    at the form of a small reply costs.
    """
    return record if type(record) is dict else record.__dict__["_data"]  # `isinstance` asks abstract classes


def put(record: ArrayRecord | MetricRecord | RecordDict, values: Mapping[str, Any]) -> None:
    """Put values of the right kinds into a record.

    Past Flower's own setter, which looks at each name and value again: a third of what a small reply costs.
    """
    record.__dict__["_data"].update(values)


def in_memory(array: Array, *, in_place: bool = False) -> DirectArray:
    """The array itself where it hands out numpy arrays, else one that holds what its `.npy` bytes say.

    Args:
        array: any.
        in_place: the values stay in those bytes, and cannot be written to; else they are copied.

    Raises:
        ValueError: they are no such bytes.
    """
    if isinstance(array, DirectArray):
        return array
    return (
        MemoryArray(npy.view(array.data)) if in_place else MemoryArray(npy.decode(array.data), shared=False)
    )


def pieces(array: Array) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The values of an array in C order, flat, with the position of each piece's first value.

    One that lies in a file is never in memory as a whole; any other comes as one piece.
    """
    if not isinstance(array, FileArray):
        yield 0, array.numpy().reshape(-1)
        return
    size = math.prod(array.shape)
    step = PIECE_BYTES // np.dtype(array.dtype).itemsize
    for start in range(0, size, step):
        yield start, array.piece(start, min(step, size - start))


def nbytes_of(array: Array) -> int:
    """Bytes of an array's values as they travel; nothing is read or serialised for it."""
    return array.nbytes if isinstance(array, DirectArray) else len(array.data)


def raw_bytes(value: npt.NDArray[Any]) -> memoryview:
    """The values as contiguous little-endian bytes; no copy is made where they are that already."""
    if not (value.flags.c_contiguous and value.dtype.byteorder in _LITTLE):
        value = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
    return value.reshape(-1).view(np.uint8).data
