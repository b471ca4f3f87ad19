"""Flower's records as protobuf content and one object of raw tensor bytes, and back, without a whole copy.

Packing yields one tensor at a time; unpacking gives arrays that are read from the object's file when they
are used. What comes from outside is bounded before anything is allocated for it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedge.errors import FormatError
from fedge.files import sync_folder
from fedge.wire import MAX_OBJECT_BYTES, MAX_TENSORS
from fedge.wire.arrays import FileArray, MemoryArray, ObjectRecord, raw_bytes
from fedge.wire.v1.records_pb2 import Content, Entry, Object, Record, Tensor, Value, Values

__all__ = ["FileArray", "MemoryArray", "Packed", "pack", "unpack", "write_object"]

MAX_RECORDS: Final = 64  # of one content
MAX_VALUES: Final = 65_536  # entries and list items of one content: each becomes a Python object
MAX_NAME: Final = 512  # characters of a record's, tensor's or entry's name
MAX_DIMENSIONS: Final = 32
DTYPES: Final = frozenset(
    ["bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))]
    + [f"float{bits}" for bits in (16, 32, 64)]
)


@dataclass(frozen=True, slots=True)
class Packed:
    """A record dict ready to travel."""

    content: Content  # complete but for the object's digest, which `write_object` knows
    arrays: tuple[tuple[str, Array], ...]  # name for messages, in the order of the object's bytes

    def buffers(self) -> Iterator[memoryview]:
        """The object's bytes, one tensor at a time; each is valid until the next is asked for.

        Raises:
            FormatError: an array's values are not of the dtype and shape that it declares.
        """
        for name, array in self.arrays:
            yield _bytes_of(name, array)


def pack(records: RecordDict) -> Packed:
    """Describe a record dict; no tensor is read or copied yet.

    Raises:
        FormatError: a dtype, value or size that the wire does not have.
    """
    content, arrays = Content(), []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            content.records.add(name=_text(name), kind=Record.ARRAYS, tensors=map(_tensor, *_columns(record)))
            arrays += list(record.items())
        else:
            kind = Record.METRICS if isinstance(record, MetricRecord) else Record.CONFIG
            content.records.add(name=_text(name), kind=kind, entries=_entries(record, kind))
    content.object.size = _checked_size(content)
    return Packed(content, tuple(arrays))


def write_object(folder: Path, packed: Packed) -> Object:
    """Write the tensors to `folder/SHA256`, whole or not at all, and complete `packed.content` with it.

    Returns:
        The object's digest and size; size 0 has no digest and no file.
    """
    if packed.content.object.size == 0:
        return packed.content.object
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new.")
    try:
        sha = hashlib.sha256()
        with os.fdopen(handle, "wb") as file:
            for part in packed.buffers():
                sha.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(folder / sha.hexdigest())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(folder)
    packed.content.object.sha256 = sha.digest()
    return packed.content.object


def unpack(content: Content, path: Path | None = None) -> RecordDict:
    """The records of a content that came over the network; their arrays stay in the file until they are used.

    Args:
        content: as it came; its object's digest has been checked by whoever received the bytes.
        path: the object's file; None when there is no object.

    Raises:
        FormatError: malformed, over a bound, or not what the file holds.
    """
    if len(content.records) > MAX_RECORDS:
        raise FormatError(f"content: {len(content.records)} records, over {MAX_RECORDS}")
    declared = _checked_size(content)
    if declared != content.object.size:
        raise FormatError(f"content: its tensors take {declared} bytes, its object {content.object.size}")
    if declared:
        _check_file(path, declared)
    _check_values(content)
    records, offset = RecordDict(), 0
    for record in content.records:
        name = _text(record.name)
        if name in records:
            raise FormatError(f"content: record {name[:60]!r} is given twice")
        if record.kind == Record.ARRAYS:
            arrays = ObjectRecord.of(content.object.sha256)
            offset = _fill(arrays, record, path or Path(), offset)
            records[name] = arrays
        else:
            records[name] = _plain(record)
    return records


def _columns(record: ArrayRecord) -> tuple[list[str], list[Array]]:
    return list(record), list(record.values())


def _tensor(name: str, array: Array) -> Tensor:
    return Tensor(name=_text(name), dtype=_dtype_name(array.dtype), shape=array.shape)


def _dtype_name(dtype: str) -> str:
    """The name without a byte order; what numpy does not know stays as it is, to be refused by name."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


def _bytes_of(name: str, array: Array) -> memoryview:
    """The values as contiguous little-endian bytes; no copy is made where they are that already."""
    try:
        value = array.numpy()
    except FormatError:
        raise
    except Exception as error:  # numpy reads a header with Python's tokenizer, which raises many kinds
        raise FormatError(f"tensor {name[:60]!r}: not an array ({type(error).__name__}: {error})") from error
    if (value.dtype.name, value.shape) != (_dtype_name(array.dtype), tuple(array.shape)):
        raise FormatError(
            f"tensor {name[:60]!r}: is {value.dtype} {value.shape}, declared {array.dtype} {array.shape}"
        )
    return raw_bytes(value)


def _checked_size(content: Content) -> int:
    """Bytes of all tensors together, each within bounds.

    Raises:
        FormatError: too many, too large, or of an unknown dtype.
    """
    tensors = [tensor for record in content.records for tensor in record.tensors]
    if len(tensors) > MAX_TENSORS:
        raise FormatError(f"content: {len(tensors)} tensors, over {MAX_TENSORS}")
    total = sum(map(_size, tensors))
    if total > MAX_OBJECT_BYTES:
        raise FormatError(f"content: tensors of {total} bytes, over {MAX_OBJECT_BYTES}")
    return total


def _size(tensor: Tensor) -> int:
    name = tensor.name[:60]
    if tensor.dtype not in DTYPES:
        hint = (
            "cast it to float32" if tensor.dtype == "bfloat16" else "use bool, int or float of up to 64 bits"
        )
        raise FormatError(f"tensor {name!r}: dtype {tensor.dtype[:40]!r} cannot travel; {hint}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise FormatError(f"tensor {name!r}: {len(tensor.shape)} dimensions, over {MAX_DIMENSIONS}")
    # Zeros left out: numpy refuses a shape whose other dimensions overflow, however empty the array.
    if prod(filter(None, tensor.shape)) > MAX_OBJECT_BYTES:
        raise FormatError(f"tensor {name!r}: shape is over {MAX_OBJECT_BYTES} elements")
    return int(prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def _check_file(path: Path | None, size: int) -> None:
    if path is None:
        raise FormatError(f"content: an object of {size} bytes is declared, and none came")
    try:
        found = path.stat().st_size
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be read ({error.strerror})") from error
    if found != size:
        raise FormatError(f"{path.name}: holds {found} bytes instead of the {size} declared")


def _check_values(content: Content) -> None:
    entries = [entry for record in content.records for entry in record.entries]
    count = len(entries) + sum(len(entry.value.list.items) for entry in entries)
    if count > MAX_VALUES:
        raise FormatError(f"content: {count} values, over {MAX_VALUES}")


def _fill(arrays: ArrayRecord, record: Record, path: Path, offset: int) -> int:
    """Put in what a record declares, from this offset of its file on; where the next record begins."""
    if record.entries:
        raise FormatError(f"content: record {record.name[:60]!r} of arrays has entries")
    for tensor in record.tensors:
        name = _text(tensor.name)
        if name in arrays:
            raise FormatError(f"content: tensor {name[:60]!r} is given twice")
        arrays[name] = FileArray(path, offset, tensor.dtype, tuple(tensor.shape))
        offset += _size(tensor)
    return offset


def _plain(record: Record) -> MetricRecord | ConfigRecord:
    if record.kind not in (Record.METRICS, Record.CONFIG) or record.tensors:
        raise FormatError(f"content: record {record.name[:60]!r} is of kind {record.kind} with other parts")
    values: dict[str, Any] = {}
    for entry in record.entries:
        if (key := _text(entry.key)) in values:
            raise FormatError(f"content: key {key[:60]!r} is given twice")
        values[key] = _read(entry.value, key)
    try:
        return MetricRecord(values) if record.kind == Record.METRICS else ConfigRecord(values)
    except TypeError as error:
        raise FormatError(f"content: record {record.name[:60]!r}: {str(error)[:200]}") from error


def _entries(record: MetricRecord | ConfigRecord, kind: Record.Kind) -> list[Entry]:
    plain: Mapping[str, Any] = record
    try:
        return [Entry(key=_text(key), value=_written(value)) for key, value in plain.items()]
    except (ValueError, TypeError) as error:  # an integer over 64 bits, text that is no Unicode
        raise FormatError(f"record of {Record.Kind.Name(kind)}: {error}") from error


def _written(value: Any) -> Value:
    if isinstance(value, list):
        return Value(list=Values(items=map(_written, value)))
    for kind, field in _FIELDS:
        if isinstance(value, kind):
            return Value(**{field: kind(value)})
    raise FormatError(f"a value of type {type(value).__name__} cannot travel")


_FIELDS: Final[tuple[tuple[type[Any], str], ...]] = (
    (bool, "flag"),  # before int, of which it is a kind
    (int, "integer"),
    (float, "real"),
    (str, "text"),
    (bytes, "data"),
)


def _read(value: Value, key: str, *, nested: bool = False) -> Any:
    kind = value.WhichOneof("kind")
    if kind is None or (kind == "list" and nested):
        raise FormatError(f"content: {key[:60]!r} holds {'a list in a list' if kind else 'no value'}")
    if kind != "list":
        return getattr(value, kind)
    items = [_read(item, key, nested=True) for item in value.list.items]
    if len({type(item) for item in items}) > 1:
        raise FormatError(f"content: {key[:60]!r} holds a list of several kinds")
    return items


def _text(name: str) -> str:
    if len(name) > MAX_NAME:
        raise FormatError(f"content: a name of {len(name)} characters, over {MAX_NAME}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"content: a name is no valid Unicode string ({error})") from error
    return name
