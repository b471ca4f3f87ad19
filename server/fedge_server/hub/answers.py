"""Whether a device's answer may be taken in: checked before a byte of it is written."""

from __future__ import annotations

import math
from typing import Final

from google.protobuf.message import DecodeError

from fedge.errors import FormatError
from fedge.wire import MAX_OBJECT_BYTES, MAX_TENSORS
from fedge.wire.v1 import records_pb2 as records

ITEM_BYTES: Final = {  # of every dtype that may travel
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}
MAX_RECORDS: Final = 64  # of one content
MAX_VALUES: Final = 65_536  # entries and list items of one content
MAX_DIMENSIONS: Final = 32
MAX_NAME: Final = 512  # characters of a record's or tensor's name
MAX_REASON: Final = 1000  # characters of a failure's reason that are kept

# Flower's error codes, which this process does not import.
NODE_UNAVAILABLE: Final = 5
ANSWER_REFUSED: Final = 4  # REPLY_MESSAGE_UNAVAILABLE: there is an answer, and it cannot be used


def read_result(data: bytes, max_result_bytes: int) -> records.Result:
    """A device's Result, whose declared tensors fit together, or a failure that it reports.

    Args:
        data: a serialised Result.
        max_result_bytes: that its object may have, as the message says.

    Raises:
        FormatError: garbage, or tensors that are too many, too large or of no known kind.
    """
    try:
        result: records.Result = records.Result.FromString(data)
    except DecodeError as error:
        raise FormatError("the answer cannot be decoded") from error
    if not (math.isfinite(result.seconds) and result.seconds >= 0):
        raise FormatError(f"the answer's seconds are {result.seconds}")
    kind = result.WhichOneof("kind")
    if kind == "content":
        check_content(result.content, max_result_bytes)
    elif kind is None:
        raise FormatError("the answer holds neither content nor failure")
    elif len(result.failure.reason) > MAX_REASON:
        result.failure.reason = result.failure.reason[:MAX_REASON]
    return result


def check_content(content: records.Content, max_bytes: int) -> None:
    """Its parts are few, its tensors of known kinds, and end to end exactly as long as the object says.

    Raises:
        FormatError: they are not; nothing may be allocated, kept or written for them.
    """
    if len(content.records) > MAX_RECORDS:  # empty ones take 60 times their bytes in memory
        raise FormatError(f"{len(content.records)} records, more than the {MAX_RECORDS} that are possible")
    _check_values(content)
    count = sum(len(record.tensors) for record in content.records)
    if count > MAX_TENSORS:
        raise FormatError(f"{count} tensors, more than the {MAX_TENSORS} that one message may have")
    size = content.object.size
    if size > min(max_bytes, MAX_OBJECT_BYTES):
        raise FormatError(f"{size} bytes of tensors, more than the {max_bytes} that were allowed")
    declared = sum(_bytes_of(tensor) for record in content.records for tensor in record.tensors)
    if declared != size:
        raise FormatError(f"tensors of {declared} bytes in an object of {size}")
    if size and len(content.object.sha256) != 32:
        raise FormatError(f"the object's SHA-256 has {len(content.object.sha256)} bytes, not 32")
    if any(len(record.name) > MAX_NAME for record in content.records):
        raise FormatError(f"a record's name has more than {MAX_NAME} characters")


def _check_values(content: records.Content) -> None:
    room = MAX_VALUES
    for record in content.records:
        room -= len(record.entries)
        for entry in record.entries if room >= 0 else ():
            items = entry.value.list.items
            room -= len(items)
            if room >= 0 and any(item.HasField("list") for item in items):
                raise FormatError("a list within a list, which no record holds")
    if room < 0:
        raise FormatError(f"more than {MAX_VALUES} values in its records")


def _bytes_of(tensor: records.Tensor) -> int:
    item = ITEM_BYTES.get(tensor.dtype)
    if item is None:
        raise FormatError(f"a tensor of dtype {tensor.dtype[:20]!r}; known: {', '.join(ITEM_BYTES)}")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise FormatError(f"a tensor with {len(tensor.shape)} dimensions, more than {MAX_DIMENSIONS}")
    if len(tensor.name) > MAX_NAME:
        raise FormatError(f"a tensor's name has more than {MAX_NAME} characters")
    size: int = item * math.prod(tensor.shape)  # Python's integers do not wrap around
    return size


def failure(code: int, reason: str) -> bytes:
    """A serialised Result that says the device has no answer."""
    result = records.Result(failure=records.Failure(code=code, reason=reason[:MAX_REASON]))
    data: bytes = result.SerializeToString()
    return data
