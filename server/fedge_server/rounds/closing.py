"""Collect a round's answers as they arrive, until quorum, deadline, or everyone has answered."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from flwr.app import ArrayRecord, Message, MetricRecord

from fedge.learning.messages import ARRAYS, CLIENTS, EXAMPLES, METRICS
from fedge.learning.terms import CONTROL, STEPS, Beside
from fedge.wire.arrays import nbytes_of, pieces, raw_bytes, records_of
from fedge_server.rounds.record import Rejected
from fedge_server.rounds.validation import NOTHING, Arrays, Decode, fault


@dataclass(frozen=True, slots=True)
class Collected:
    """What came back before the round closed."""

    valid: list[Message]  # updates to aggregate, in the order of their clients
    clients: int  # whose updates they hold: more than messages where they are partial sums
    rejected: tuple[Rejected, ...]
    bytes_up: int  # arrays received, rejected ones too
    updates: str  # SHA-256 of the anonymous set of valid updates
    facts: Mapping[str, float | str] = field(default_factory=dict)  # of a sum under masks, for the record


def collect(
    replies: Iterable[Message],
    *,
    like: Arrays,
    asked: set[int],
    quorum: float,
    at_least: int = 1,
    guarded: bool = False,
    beside: Beside = NOTHING,
    decode: Decode | None = None,
) -> Collected:
    """Take replies until a share `quorum` of those asked has sent a valid update, or there are no more.

    The Grid ends its iteration at the deadline. Once the quorum is there, nobody is waited for; a client
    that answers twice, or was not asked, is rejected.

    Args:
        replies: from the Grid, as they arrive.
        like: the global state, against which each update is held.
        asked: node ids that were asked.
        quorum: above 0, at most 1.
        at_least: never close earlier than with so many (the round would not count).
        guarded: clients were told to protect themselves; an update that does not say so is rejected.
        beside: what the strategy's terms ask for besides.
        decode: clients were asked to use a codec; bytes are counted as they travelled.
    """
    needed = enough(len(asked), quorum, at_least)
    valid: dict[int, Message] = {}
    rejected: list[Rejected] = []
    received = 0
    for reply in replies:
        client = reply.metadata.src_node_id
        received += payload_bytes(reply)
        if client not in asked:
            rejected.append(Rejected(client, "was not asked"))
        elif client in valid:
            rejected.append(Rejected(client, "answered twice; the first answer counts"))
        elif reason := fault(reply, like, guarded=guarded, beside=beside, decode=decode):
            rejected.append(Rejected(client, reason))
        else:
            valid[client] = reply
            if len(valid) >= needed:
                break
    # Sums are not associative in floating point: a fixed order makes the result independent of arrival.
    updates = [valid[client] for client in sorted(valid)]
    # Now, before any strategy: some of Flower's empty or change the messages that they aggregate.
    return Collected(updates, len(updates), tuple(rejected), received, set_digest(updates))


def enough(asked: int, quorum: float, at_least: int) -> int:
    """Valid updates that close a round."""
    return max(math.ceil(quorum * asked - 1e-9), at_least)


def collect_sums(
    replies: Iterable[Message],
    *,
    like: Arrays,
    asked: set[int],
    needed: int,
    beside: Beside = NOTHING,
) -> Collected:
    """The same where partial sums were asked for, each of which holds the updates of several clients.

    Args:
        replies: partial sums, and errors of single clients, as they arrive.
        like: the global state, against which each sum is held.
        asked: node ids that were asked; no more clients than these are counted.
        needed: nobody is waited for once the sums hold so many.
        beside: as in `collect`.
    """
    valid: list[Message] = []
    rejected: list[Rejected] = []
    clients, received, failed = 0, 0, set[int]()
    for reply in replies:
        client = reply.metadata.src_node_id
        reason = fault(reply, like, clients=len(asked) - clients - len(failed), beside=beside)
        if not reply.has_error() and reason is None:
            held = int(records_of(reply.content, MetricRecord)[METRICS][CLIENTS])  # type: ignore[arg-type]
            received += held * payload_bytes(reply)  # each of them has sent as much to whoever added it up
            clients += held
            valid.append(reply)
            if clients >= needed:
                break
        elif client not in asked or (reply.has_error() and client in failed):
            rejected.append(Rejected(client, "was not asked, or answered twice"))
        else:
            failed |= {client} if reply.has_error() else set()
            rejected.append(Rejected(client, reason or "unknown error"))
    return Collected(valid, clients, tuple(rejected), received, set_digest(valid))


def set_digest(updates: list[Message]) -> str:
    """The updates' own digests, sorted, hashed: no client's name and no order goes into it."""
    return hashlib.sha256("".join(sorted(map(_digest, updates))).encode()).hexdigest()


def payload_bytes(message: Message) -> int:
    """Bytes of all arrays in a message; nothing is read or serialised for it."""
    if not message.has_content():
        return 0
    return sum(
        nbytes_of(array)
        for record in records_of(message.content, ArrayRecord).values()
        for array in record.values()
    )


@lru_cache(maxsize=4096)
def _label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"\0{name}\0{dtype}\0{shape}\0".encode()


def _digest(message: Message) -> str:
    """Over examples, a sum's clients, names, dtypes, shapes and values: the same however the arrays came."""
    metrics = records_of(message.content, MetricRecord)[METRICS]
    counted = f" in {metrics[CLIENTS]} clients" if CLIENTS in metrics else ""
    steps = f" after {metrics[STEPS]} steps" if STEPS in metrics else ""
    sha = hashlib.sha256(f"{metrics[EXAMPLES]}{counted}{steps}".encode())
    records = records_of(message.content, ArrayRecord)
    for record in (ARRAYS, CONTROL) if CONTROL in records else (ARRAYS,):
        for name, array in records[record].items():
            sha.update(_label(name, array.dtype, tuple(array.shape)))
            for _, piece in pieces(array):
                sha.update(raw_bytes(piece))
    return sha.hexdigest()
