"""Whether one client's update may be aggregated: a bad one is rejected with its reason, never the round.

Flower's strategies trust their input: a NaN becomes the global model, a shape (1,) is broadcast into the
average, an extra key loses the whole round (each was observed). So every reply goes through `validated`
before any rule sees it, and nothing of a bad one is ever added to anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.common.constant import ErrorCode

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
from fedge.wire.arrays import (
    DirectArray,
    FileArray,
    MemoryArray,
    in_memory,
    pieces,
    put,
    records_of,
    table_of,
)
from fedge_server.rounds.norms import squares
from fedge_server.rounds.record import AWAY, CLIENT, FORM, NORM, NOT_FINITE, REFUSED
from fedge_server.rounds.record import METRICS as METRICS_FAULT

MAX_LOSS = 1e6  # of one client; QFedAvg raises it to a power
HELD_BYTES: Final = 64 * 1024**2  # an update of at most so many is read from its file once, and then held

Arrays = Mapping[str, npt.NDArray[np.generic]]
Said = Mapping[str, Any]  # metrics of a reply
NOTHING: Final = Beside()
Decode = Callable[[Message], None]
"""Turn an update in a codec into arrays, in place; raises FormatError for one that is none."""


class UnfitError(Exception):
    """An update that must not be used; its text is the reason, in one printable line."""

    def __init__(self, reason: str, kind: str = FORM) -> None:
        super().__init__(reason)
        self.kind = kind  # of record.KINDS


@dataclass(frozen=True, slots=True)
class Rules:
    """What a round's updates must be."""

    origin: Arrays  # what changes are measured from; names, shapes and dtypes must be the same
    guarded: bool = False  # clients were told to protect themselves, which an older one does not understand
    max_examples: int = MAX_EXAMPLES  # of one client
    max_norm: float = math.inf  # of the change; infinite: not bounded
    norms: bool = False  # they are wanted for the record, bounded or not
    read_once: bool = False  # values will be read once more and not changed: then they stay where they came
    beside: Beside = NOTHING  # what the strategy's terms ask for besides
    decode: Decode | None = None  # clients were asked to use a codec


@dataclass(frozen=True, slots=True)
class Valid:
    """An update that may be used."""

    records: Mapping[str, ArrayRecord]  # of decoded arrays; the reply has them now
    examples: int
    clients: int  # 1, or how many a partial sum holds
    norm: float | None  # of the change, where it was asked for


def validated(reply: Message, rules: Rules, *, clients: int | None = None) -> Valid:
    """The update, decoded and looked at whole: the one way from a reply to any rule.

    Args:
        reply: a client's answer to a train message; in it, records of the decoded arrays take the place of
            those that were sent.
        rules: of the round.
        clients: None: one client's update. A number: a partial sum was asked for, of so many at most.

    Raises:
        UnfitError: it must not be used.
    """
    try:
        if reply.has_error():
            raise UnfitError(f"client error: {_last_line(reply.error.reason)}", error_kind(reply))
        own = rules.beside.like
        origin = rules.origin if own is None else own(reply.metadata.src_node_id)
        wanted = {ARRAYS: origin, **rules.beside.arrays}
        sent, metrics = _records(reply, wanted, rules.decode)
        if found := _metrics_fault(metrics, clients, rules):
            raise UnfitError(found, METRICS_FAULT)
        if found := _form_fault(sent, wanted):
            raise UnfitError(found)
        with np.errstate(all="ignore"):  # what overflows is not finite, and that is looked at
            arrays, squares = _look_through(sent, wanted, rules)
        if (norm := math.sqrt(squares)) > rules.max_norm:
            raise UnfitError(
                f"its change has the norm {norm:.6g}, over the {rules.max_norm:.6g} that is allowed", NORM
            )
    except UnfitError as error:
        raise UnfitError(_short(str(error)), error.kind) from None
    except FormatError as error:
        raise UnfitError(_short(str(error))) from None
    except Exception as error:  # it rejects the client, not the round
        raise UnfitError(_short(f"cannot be read ({type(error).__name__}: {error})")) from error
    put(reply.content, arrays)
    examples, held = metrics[EXAMPLES], metrics.get(CLIENTS, 1)
    return Valid(arrays, int(examples), int(held), norm if rules.norms else None)


def error_kind(reply: Message) -> str:
    """Whose fault an error reply is: the hub answers for a device that is away or sends garbage."""
    return {ErrorCode.NODE_UNAVAILABLE: AWAY, ErrorCode.REPLY_MESSAGE_UNAVAILABLE: REFUSED}.get(
        reply.error.code, CLIENT
    )


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


def _records(
    reply: Message, wanted: Mapping[str, Arrays], decode: Decode | None
) -> tuple[dict[str, ArrayRecord], Said]:
    if table_of(reply.content).keys() != {*wanted, METRICS}:
        raise UnfitError(f"records {sorted(reply.content)} instead of {sorted((*wanted, METRICS))}")
    if decode is not None:
        decode(reply)
    arrays, metrics = records_of(reply.content, ArrayRecord), table_of(reply.content)[METRICS]
    if arrays.keys() != wanted.keys() or not isinstance(metrics, MetricRecord):
        raise UnfitError("records of the wrong kind")
    return arrays, table_of(metrics)


def _metrics_fault(metrics: Said, clients: int | None, rules: Rules) -> str | None:
    wanted = {EXAMPLES, TRAIN_LOSS, *rules.beside.metrics} | ({CLIENTS} if clients is not None else set())
    wanted |= {GUARDED} if rules.guarded else set()
    if metrics.keys() != wanted:
        return f"metrics {sorted(metrics)} instead of {sorted(wanted)}"
    count = 1
    if clients is not None:
        stated = metrics[CLIENTS]
        if not _is_whole(stated, 1, clients):
            return f"{CLIENTS} is {stated!r}; it must be a whole number from 1 to {clients}, as many as asked"
        count = int(stated)
    if (found := _examples_fault(metrics, count, most=rules.max_examples)) is not None:
        return found
    if not _within(metrics[TRAIN_LOSS], MAX_LOSS):
        return f"{TRAIN_LOSS} is {metrics[TRAIN_LOSS]!r}; it must be a number from 0 to {MAX_LOSS:g}"
    for name, most in rules.beside.metrics.items():
        if not _is_whole(metrics[name], 1, most):
            return f"{name} is {metrics[name]!r}; it must be a whole number from 1 to {most}"
    return None


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _within(value: object, maximum: float) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= maximum  # NaN is not


def _share_fault(metrics: Said) -> str | None:
    """An accuracy is so many of the examples; anything else was not counted."""
    accuracy, examples = metrics["accuracy"], metrics[EXAMPLES]
    right = float(accuracy) * float(examples)
    if abs(right - round(right)) > 1e-6 * float(examples):
        return f"accuracy is {accuracy!r}, which no whole number of {examples} examples gives"
    return None


def _examples_fault(metrics: Said, clients: int = 1, *, most: int = MAX_EXAMPLES) -> str | None:
    examples, most = metrics.get(EXAMPLES), clients * most
    if not _is_whole(examples, clients, most):
        return f"{EXAMPLES} is {examples!r}; it must be a whole number from {clients} to {most}"
    return None


def _form_fault(sent: Mapping[str, ArrayRecord], wanted: Mapping[str, Arrays]) -> str | None:
    for key, expected in wanted.items():
        record = table_of(sent[key])
        if list(record) != list(expected):
            wrong = sorted(set(record) ^ set(expected))
            return f"array names differ: {', '.join(wrong[:3]) or 'another order'}"
        for name, like in expected.items():
            if (found := declared_fault(record[name], like)) is not None:
                return f"array {name!r} {found}"
    return None


def _look_through(
    sent: Mapping[str, ArrayRecord], wanted: Mapping[str, Arrays], rules: Rules
) -> tuple[dict[str, ArrayRecord], float]:
    """Decode one array after the other, and look at every value: an update may be as large as the model.

    Returns:
        The decoded arrays, and the squared norm of the change, which is 0 where nobody asks for it.
    """
    measured, held = rules.norms or rules.max_norm < math.inf, rules.read_once and _is_small(wanted)
    found, total = {key: ArrayRecord() for key in wanted}, 0.0
    for key, expected in wanted.items():
        of_change, record, looked = measured and key == ARRAYS, table_of(sent[key]), {}
        for name, like in expected.items():
            decoded = _decoded(record[name], held=held or like.dtype.kind != "f", in_place=rules.read_once)
            summed = _squares(name, decoded, like, of_change=of_change)
            if not math.isfinite(summed):
                raise UnfitError(f"array {name!r} holds NaN or infinite values", NOT_FINITE)
            total += summed if of_change else 0.0
            looked[name] = decoded
        put(found[key], looked)
    return found, total


def _is_small(wanted: Mapping[str, Arrays]) -> bool:
    return sum(like.nbytes for expected in wanted.values() for like in expected.values()) <= HELD_BYTES


def _decoded(array: Array, *, held: bool, in_place: bool) -> DirectArray:
    try:
        decoded = in_memory(array, in_place=in_place)
        if held and isinstance(decoded, FileArray):
            return MemoryArray(decoded.numpy(), shared=False)
    except (ValueError, EOFError, OSError, FedgeError) as error:
        raise UnfitError(f"arrays cannot be decoded ({error})") from error
    return decoded


def _squares(name: str, array: DirectArray, like: npt.NDArray[np.generic], *, of_change: bool) -> float:
    """The sum of squares of an array that is as declared, or of what it differs by; 0 of whole numbers."""
    floating, start = like.dtype.kind == "f", like.reshape(-1) if of_change else None
    if not isinstance(array, FileArray):
        value = array.numpy()
        if value.shape != like.shape or value.dtype != like.dtype:
            raise UnfitError(f"array {name!r} decodes to {value.dtype} {value.shape}")
        return squares(value.reshape(-1), start) if floating else 0.0
    try:  # a file's bytes are read as what was declared
        return sum(
            squares(piece, None if start is None else start[at : at + piece.size])
            for at, piece in pieces(array)
        )
    except (OSError, FedgeError) as error:
        raise UnfitError(f"arrays cannot be decoded ({error})") from error


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


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def _short(text: str) -> str:
    """What a client sent goes into records and onto terminals: printable, and a line or two at most."""
    return "".join(character if character.isprintable() else "?" for character in text[:300])
