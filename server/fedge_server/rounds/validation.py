"""Whether one client's update may be aggregated: a bad one is rejected with its reason, never the round.

Flower's strategies trust their input: a NaN becomes the global model, a shape (1,) is broadcast into the
average, an extra key loses the whole round (each was observed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from fedge.errors import FedgeError, FormatError
from fedge.learning.messages import (
    ARRAYS,
    CLIENTS,
    EXAMPLES,
    GUARDED,
    HELD_OUT,
    MAX_EXAMPLES,
    METRICS,
    TRAIN_LOSS,
)
from fedge.learning.terms import Beside
from fedge.wire import npy
from fedge.wire.arrays import DirectArray, in_memory, put, records_of

MAX_LOSS = 1e6  # of one client; QFedAvg raises it to a power

Arrays = Mapping[str, npt.NDArray[np.generic]]
NOTHING: Final = Beside()
Decode = Callable[[Message], None]
"""Turn an update in a codec into arrays, in place; raises FormatError for one that is none."""


def fault(
    reply: Message,
    like: Arrays,
    *,
    clients: int | None = None,
    guarded: bool = False,
    beside: Beside = NOTHING,
    decode: Decode | None = None,
) -> str | None:
    """Why the update must not be used, or None when it may.

    Args:
        reply: a client's answer to a train message; arrays that came as `.npy` bytes are decoded here, once,
            and stay decoded.
        like: the global state; names, shapes and dtypes must be the same.
        clients: None: one client's update. A number: a partial sum was asked for, of so many at most.
        guarded: clients were told to protect themselves, which an older one does not understand.
        beside: what the strategy's terms ask for besides.
        decode: clients were asked to use a codec.
    """
    try:
        found = _fault(reply, like, clients, guarded, beside, decode)
    except FormatError as error:
        found = str(error)
    except Exception as error:  # noqa: BLE001 - it rejects the client, not the round
        found = f"cannot be read ({type(error).__name__}: {error})"
    return None if found is None else _short(found)


def error_of(reply: Message) -> str:
    """What a client said went wrong, in one line."""
    return _short(f"client error: {_last_line(reply.error.reason)}")


def evaluation_fault(reply: Message, *, held_out: bool = False) -> str | None:
    """Why a client's evaluation must not be averaged, or None when it may.

    Args:
        reply: a client's answer to an evaluate message.
        held_out: clients were told to keep examples back, which an older one does not understand.
    """
    if reply.has_error():
        return error_of(reply)
    try:
        metrics = records_of(reply.content, MetricRecord)[METRICS]
        wanted = {EXAMPLES, "loss", "accuracy"} | ({HELD_OUT} if held_out else set())
        if sorted(reply.content) != [METRICS] or set(metrics) != wanted:
            return _short(f"metrics {sorted(metrics)} instead of {sorted(wanted)}")
        if (found := _examples_fault(metrics)) is not None:
            return _short(found)
        for name, most in (("loss", MAX_LOSS), ("accuracy", 1.0)):
            if not _within(metrics[name], most):
                return _short(f"{name} is {metrics[name]!r}; it must be a number from 0 to {most:g}")
        return _share_fault(metrics)
    except Exception as error:  # noqa: BLE001 - as above
        return _short(f"cannot be read ({type(error).__name__}: {error})")


def _fault(
    reply: Message,
    like: Arrays,
    clients: int | None,
    guarded: bool,
    beside: Beside,
    decode: Decode | None,
) -> str | None:
    if reply.has_error():
        return f"client error: {_last_line(reply.error.reason)}"
    own = like if beside.like is None else beside.like(reply.metadata.src_node_id)
    wanted = {ARRAYS: own, **beside.arrays}
    if sorted(reply.content) != sorted((*wanted, METRICS)):
        return f"records {sorted(reply.content)} instead of {sorted((*wanted, METRICS))}"
    if decode is not None:
        decode(reply)
    metrics = reply.content[METRICS]
    if not isinstance(metrics, MetricRecord):
        return "records of the wrong kind"
    found = _metrics_fault(metrics, clients, guarded, beside)
    for name, expected in wanted.items():
        arrays = reply.content[name]
        if not isinstance(arrays, ArrayRecord):
            return "records of the wrong kind"
        found = found or _arrays_fault(arrays, expected)
    return found


def _metrics_fault(metrics: MetricRecord, clients: int | None, guarded: bool, beside: Beside) -> str | None:
    wanted = {EXAMPLES, TRAIN_LOSS, *beside.metrics} | ({CLIENTS} if clients is not None else set())
    wanted |= {GUARDED} if guarded else set()
    if set(metrics) != wanted:
        return f"metrics {sorted(metrics)} instead of {sorted(wanted)}"
    count = 1
    if clients is not None:
        stated = metrics[CLIENTS]
        if not _is_whole(stated, 1, clients):
            return f"{CLIENTS} is {stated!r}; it must be a whole number from 1 to {clients}, as many as asked"
        count = int(stated)  # type: ignore[arg-type]  # it is one
    if (found := _examples_fault(metrics, count)) is not None:
        return found
    if not _within(metrics[TRAIN_LOSS], MAX_LOSS):
        return f"{TRAIN_LOSS} is {metrics[TRAIN_LOSS]!r}; it must be a number from 0 to {MAX_LOSS:g}"
    for name, most in beside.metrics.items():
        if not _is_whole(metrics[name], 1, most):
            return f"{name} is {metrics[name]!r}; it must be a whole number from 1 to {most}"
    return None


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _within(value: object, maximum: float) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= maximum  # NaN is not


def _share_fault(metrics: MetricRecord) -> str | None:
    """An accuracy is so many of the examples; anything else was not counted."""
    accuracy, examples = metrics["accuracy"], metrics[EXAMPLES]
    right = float(accuracy) * float(examples)  # type: ignore[arg-type]  # both are numbers by now
    if abs(right - round(right)) > 1e-6 * float(examples):  # type: ignore[arg-type]  # likewise
        return f"accuracy is {accuracy!r}, which no whole number of {examples} examples gives"
    return None


def _examples_fault(metrics: MetricRecord, clients: int = 1) -> str | None:
    examples, most = metrics.get(EXAMPLES), clients * MAX_EXAMPLES
    if not _is_whole(examples, clients, most):
        return f"{EXAMPLES} is {examples!r}; it must be a whole number from {clients} to {most}"
    return None


def _arrays_fault(record: ArrayRecord, like: Arrays) -> str | None:
    if list(record) != list(like):
        wrong = sorted(set(record) ^ set(like))
        return f"array names differ: {', '.join(wrong[:3]) or 'another order'}"
    for name, expected in like.items():
        if (found := declared_fault(record[name], expected)) is not None:
            return f"array {name!r} {found}"
    for name, expected in like.items():  # one at a time: an update may be as large as the model
        try:
            decoded = in_memory(record[name])
            value = decoded.numpy()
        except (ValueError, EOFError, OSError, FedgeError) as error:
            return f"arrays cannot be decoded ({error})"
        if value.shape != expected.shape or value.dtype != expected.dtype:
            return f"array {name!r} decodes to {value.dtype} {value.shape}"
        if value.dtype.kind == "f" and not _is_finite(value):
            return f"array {name!r} holds NaN or infinite values"
        put(record, {name: decoded})
    return None


def declared_fault(array: Array, expected: npt.NDArray[np.generic]) -> str | None:
    """What is wrong with what an array says of itself, before any of its bytes are decoded."""
    if tuple(array.shape) != expected.shape or np.dtype(array.dtype) != expected.dtype:
        return f"is {array.dtype} {tuple(array.shape)} instead of {expected.dtype} {expected.shape}"
    if isinstance(array, DirectArray):
        return None  # it has no second header that could say otherwise
    if len(array.data) > expected.nbytes + 1024:  # Flower's .npy header is 128 bytes
        return f"carries {len(array.data)} bytes for {expected.nbytes}"
    header = npy.declared(array.data)
    if header is None or (header.shape, header.dtype) != (expected.shape, expected.dtype):
        return f"cannot be decoded: its bytes declare {header and (header.shape, header.dtype)}"
    return None


def _is_finite(value: npt.NDArray[np.generic]) -> bool:
    """One pass over the bytes: the sum of squares is finite only where every value is, and none absurd."""
    flat = value.ravel()
    if flat.dtype == np.float16:  # its squares would overflow at 256
        flat = flat.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(flat, flat)))


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _short(text: str) -> str:
    """What a client sent goes into records and onto terminals: printable, and a line or two at most."""
    return "".join(character if character.isprintable() else "?" for character in text[:300])
