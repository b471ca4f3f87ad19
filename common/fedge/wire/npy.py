"""Flower's plain arrays: `.npy` bytes whose header is read once for all clients that send the same shapes.

`np.load` reads a header with Python's own parser, which costs a small array more than all else.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_HEADER: Final = 1024  # bytes; numpy's own are 128 for up to 32 dimensions of numbers
_PREFIX: Final = 10  # bytes: magic, version, length of what follows (numpy.lib.format, version 1.0)


class Header(NamedTuple):
    """What `.npy` bytes say of themselves."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool  # the first dimension runs fastest
    size: int  # bytes of the header


def declared(data: bytes) -> Header | None:
    """The header of `.npy` bytes in version 1.0; None where they begin with none."""
    stop = _PREFIX + int.from_bytes(data[8:_PREFIX], "little")
    if not _PREFIX < stop <= min(len(data), MAX_HEADER):
        return None
    try:
        return _parsed(bytes(data[:stop]))
    except Exception:  # noqa: BLE001 - numpy's header reader raises many kinds, tokenize errors among them
        return None


@lru_cache(maxsize=256)
def _parsed(header: bytes) -> Header:
    buffer = io.BytesIO(header)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    return Header(shape, dtype, fortran, len(header))


def decode(data: bytes) -> npt.NDArray[Any]:
    """The values of `.npy` bytes, writable and in C order; errors as in `view`."""
    return view(data).copy(order="C")


def view(data: bytes) -> npt.NDArray[Any]:
    """The values of `.npy` bytes where they lie, in the order in which they lie; they cannot be written to.

    Raises:
        ValueError: no header, too few bytes for what it declares, or objects, which would be pickles.
    """
    found = declared(data)
    if found is None or found.dtype.hasobject:
        raise ValueError("no .npy bytes of numbers")
    count = math.prod(found.shape)
    flat = np.frombuffer(data, found.dtype, count, found.size) if count else np.empty(0, found.dtype)
    return flat.reshape(found.shape[::-1]).T if found.fortran else flat.reshape(found.shape)
