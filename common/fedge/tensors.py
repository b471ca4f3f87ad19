"""Named arrays as safetensors bytes: the same input gives the same bytes, and nothing read is trusted.

The library's reader does the checking. Its writer is not used: it orders metadata at random, so equal
input gave unequal digests, and it silently reorders the elements of a transposed array.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize, safe_open

from fedge.errors import FormatError

Array = npt.NDArray[Any]

MAX_BYTES: Final = 2 * 1024**3  # of one document
MAX_HEADER_BYTES: Final = 1024**2  # about 10,000 tensors; bounds what a reader spends on names and shapes

_CODE_OF: Final = {
    np.dtype(np.bool_): "BOOL",
    **{np.dtype(f"u{size}"): f"U{8 * size}" for size in (1, 2, 4, 8)},
    **{np.dtype(f"i{size}"): f"I{8 * size}" for size in (1, 2, 4, 8)},
    **{np.dtype(f"f{size}"): f"F{8 * size}" for size in (2, 4, 8)},
}
_DTYPE_OF: Final = {code: dtype for dtype, code in _CODE_OF.items()}
_METADATA: Final = "__metadata__"
_NO_METADATA: Final[Mapping[str, str]] = {}


def dump(arrays: Mapping[str, Array], metadata: Mapping[str, str] = _NO_METADATA) -> bytes:
    """The arrays as one safetensors document; wide elements first, so that every array is aligned.

    Args:
        arrays: by name; bool, integers or floats of 16 to 64 bits, of any shape and memory layout.
        metadata: text that travels in the header.

    Raises:
        FormatError: a dtype that the format does not have, or a name or text that it cannot hold.
    """
    return b"".join(dump_chunks(arrays, metadata))


def dump_chunks(
    arrays: Mapping[str, Array], metadata: Mapping[str, str] = _NO_METADATA
) -> Iterator[bytes | memoryview]:
    """The bytes of `dump` one array at a time; a contiguous array is shown where it lies, not copied.

    Raises:
        FormatError: as `dump` does, before the first chunk is asked for.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    names = sorted(arrays, key=lambda key: (-arrays[key].dtype.itemsize, key))
    for name in names:
        array = arrays[name]
        code = _CODE_OF.get(array.dtype.newbyteorder("="))
        if code is None or name == _METADATA:
            raise FormatError(
                f"tensors: {name!r} of dtype {array.dtype} cannot be written; use bool, int or float"
            )
        end = offset + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = _encode(header)
    start = struct.pack("<Q", len(text)) + text
    return itertools.chain((start,), (_raw(arrays[name]) for name in names))


def _raw(array: Array) -> memoryview:
    """Little-endian bytes in C order."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data


def _encode(header: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise FormatError(f"tensors: a name or metadata text is no valid Unicode string ({error})") from error
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(
            f"tensors: names, shapes and metadata take {len(text)} bytes, over {MAX_HEADER_BYTES}"
        )
    return text


def parse(data: bytes, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays, writable, native and in the document's order, and the metadata of bytes from outside.

    Raises:
        FormatError: truncated, over `max_bytes`, garbage, overlapping or uncovered bytes, a name given
            twice, a dtype that numpy lacks, or a bool that is neither 0 nor 1.
    """
    _check_length(data, len(data), max_bytes)
    try:
        # Checks offsets, sizes and cover, then copies each tensor once; in an order that differs by call.
        found = dict(deserialize(bytes(data)))  # type: ignore[no-untyped-call]
        header = _header(data)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(f"tensors: not a safetensors document ({str(error)[:200]!r})") from error
    arrays = {name: _array(name, found[name]) for name in header if name != _METADATA}
    return arrays, header.get(_METADATA) or {}


def load(path: Path, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Array], dict[str, str]]:
    """What `parse` makes of a file's bytes, without holding them in memory beside the arrays.

    Args:
        path: a file that nobody changes meanwhile.
        max_bytes: how long it may be.

    Raises:
        FormatError: as `parse` does, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8 + MAX_HEADER_BYTES)
            _check_length(start, os.fstat(file.fileno()).st_size, max_bytes)
            with safe_open(path, "numpy"):  # checks offsets, sizes and cover; reads no tensor
                header = _header(start)
            (length,) = struct.unpack("<Q", start[:8])
            names = [name for name in header if name != _METADATA]
            arrays = {name: _read(file, 8 + length, name, header[name]) for name in names}
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path}: not a safetensors document ({str(error)[:200]!r})") from error
    return arrays, header.get(_METADATA) or {}


def _check_length(start: bytes, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise FormatError(f"tensors: {size} bytes, over the {max_bytes} they may have")
    if size < 8:
        raise FormatError(f"tensors: {size} bytes are too short for a header")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise FormatError(f"tensors: a header of {length} bytes is over {MAX_HEADER_BYTES}, or is truncated")


def _header(start: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", start[:8])
    found: dict[str, Any] = json.loads(start[8 : 8 + length], object_pairs_hook=_without_duplicates)
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is given twice")
    return made


def _array(name: str, raw: Mapping[str, Any]) -> Array:
    dtype, shown = _dtype(name, raw["dtype"]), repr(name[:60])
    if dtype == np.bool_ and raw["data"].translate(None, b"\x00\x01"):
        raise FormatError(f"tensors: {shown} is bool but holds other values than 0 and 1")
    try:
        array = np.frombuffer(raw["data"], dtype=dtype).reshape(raw["shape"])
    except (ValueError, OverflowError) as error:
        raise FormatError(f"tensors: {shown} has a shape that numpy cannot hold ({error})") from error
    return array if sys.byteorder == "little" else array.byteswap(inplace=True)


def _read(file: io.BufferedReader, start: int, name: str, entry: Mapping[str, Any]) -> Array:
    """An array from its place in a file whose header has been checked."""
    dtype = _dtype(name, entry["dtype"])
    array = np.empty(entry["shape"], dtype)
    raw = array.reshape(-1).view(np.uint8)
    file.seek(start + entry["data_offsets"][0])
    if file.readinto(raw.data) != raw.nbytes:
        raise FormatError(f"tensors: {name[:60]!r} was cut off while it was read")
    if dtype == np.bool_ and raw.max(initial=0) > 1:
        raise FormatError(f"tensors: {name[:60]!r} is bool but holds other values than 0 and 1")
    return array if sys.byteorder == "little" else array.byteswap(inplace=True)


def _dtype(name: str, code: str) -> np.dtype[Any]:
    dtype = _DTYPE_OF.get(code)
    if dtype is None:
        raise FormatError(f"tensors: {name[:60]!r} has dtype {code}, which is not supported here")
    return dtype
