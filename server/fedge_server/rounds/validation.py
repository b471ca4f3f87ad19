"""Whether one client's update may be aggregated: a bad one is rejected with its reason, never the round.

Flower's strategies trust their input: a NaN becomes the global model, a shape (1,) is broadcast into the
average, an extra key loses the whole round (each was observed).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS, TRAIN_LOSS, from_record

MAX_EXAMPLES = 10**9  # of one client; more would let one client outweigh all others

Arrays = Mapping[str, npt.NDArray[np.generic]]


def fault(reply: Message, like: Arrays) -> str | None:
    """Why the update must not be used, or None when it may.

    Args:
        reply: a client's answer to a train message.
        like: the global state; names, shapes and dtypes must be the same.
    """
    if reply.has_error():
        return f"client error: {_short(reply.error.reason)}"
    if sorted(reply.content) != sorted((ARRAYS, METRICS)):
        return f"records {sorted(reply.content)} instead of {[ARRAYS, METRICS]}"
    if len(reply.content.array_records) != 1 or len(reply.content.metric_records) != 1:
        return "records of the wrong kind"
    return _metrics_fault(reply) or _arrays_fault(reply, like)


def _metrics_fault(reply: Message) -> str | None:
    metrics = reply.content.metric_records[METRICS]
    examples, loss = metrics.get(EXAMPLES), metrics.get(TRAIN_LOSS)
    if isinstance(examples, bool) or not isinstance(examples, int) or not 1 <= examples <= MAX_EXAMPLES:
        return f"{EXAMPLES} is {examples!r}; it must be a whole number from 1 to {MAX_EXAMPLES}"
    if not isinstance(loss, (int, float)) or not np.isfinite(loss):
        return f"{TRAIN_LOSS} is {loss!r}; it must be a finite number"
    return None


def _arrays_fault(reply: Message, like: Arrays) -> str | None:
    record = reply.content.array_records[ARRAYS]
    if list(record) != list(like):
        wrong = sorted(set(record) ^ set(like))
        return f"array names differ: {', '.join(wrong[:3]) or 'another order'}"
    for name, expected in like.items():
        array = record[name]  # its header is checked before its bytes are decoded
        if tuple(array.shape) != expected.shape or np.dtype(array.dtype) != expected.dtype:
            found = f"{array.dtype} {tuple(array.shape)}"
            return f"array {name!r} is {found} instead of {expected.dtype} {expected.shape}"
        if len(array.data) > expected.nbytes + 1024:  # Flower's .npy header is 128 bytes
            return f"array {name!r} carries {len(array.data)} bytes for {expected.nbytes}"
    try:
        arrays = from_record(record)
    except (ValueError, EOFError, OSError) as error:
        return f"arrays cannot be decoded ({_short(str(error))})"
    for name, value in arrays.items():
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            return f"array {name!r} decodes to {value.dtype} {value.shape}"
        if value.dtype.kind == "f" and not np.isfinite(np.dot(value.ravel(), value.ravel())):
            return f"array {name!r} holds NaN or infinite values"
    return None


def _short(text: str | None) -> str:
    lines = (text or "no reason given").strip().splitlines()
    return lines[-1][:300] if lines else "no reason given"
