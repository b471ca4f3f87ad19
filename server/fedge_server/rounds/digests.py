"""The digest of a round's updates, with which the lineage of every release ends.

SHA-256 runs at a fifth of the speed at which updates are added up, so nothing is hashed twice: what came over
the link was hashed by the hub as it arrived, and that digest is taken. Anything else is hashed here, large
updates in a second thread beside the sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from functools import lru_cache
from typing import Final

from flwr.app import ArrayRecord, Message, MetricRecord

from fedge.learning.messages import CLIENTS, EXAMPLES, METRICS
from fedge.learning.terms import STEPS
from fedge.wire.arrays import ObjectRecord, in_memory, nbytes_of, pieces, raw_bytes, records_of

Sent = Mapping[str, ArrayRecord]
"""Records of arrays by name, in the order in which they came."""

WORTH_A_THREAD: Final = 2**18  # bytes from which a second thread pays (benchmarks/aggregation.py)


def arrays_sent(message: Message) -> Sent:
    """The arrays as they came, before decoded ones take their place in the message."""
    return records_of(message.content, ArrayRecord) if message.has_content() else {}


def digest_of(sent: Sent, message: Message) -> str:
    """Over examples, a sum's clients, steps, names, dtypes, shapes and values: the same however arrays came.

    Args:
        sent: a valid update's arrays, as they came.
        message: that they came in.
    """
    return _whole(sent, message, _payload(sent))


def digest_beside(sent: Sent, message: Message, executor: Executor) -> Callable[[], str]:
    """The same, worked out by the executor where that pays; to be asked for while the arrays are there."""
    size = sum(nbytes_of(array) for record in sent.values() for array in record.values())
    if size < WORTH_A_THREAD or _object(sent):
        found = digest_of(sent, message)
        return lambda: found
    future = executor.submit(_payload, sent)
    return lambda: _whole(sent, message, future.result())


def set_digest(digests: Iterable[str]) -> str:
    """The updates' own digests, sorted, hashed: no client's name and no order goes into it."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _object(sent: Sent) -> bytes:
    """The SHA-256 of the object in which all of them travelled; empty where they did not."""
    found = {record.sha256 if isinstance(record, ObjectRecord) else b"" for record in sent.values()}
    return found.pop() if len(found) == 1 else b""


def _payload(sent: Sent) -> bytes:
    """SHA-256 of the arrays' little-endian bytes, one array after the other."""
    if known := _object(sent):
        return known
    sha = hashlib.sha256()
    for record in sent.values():
        for array in record.values():
            for _, piece in pieces(in_memory(array, in_place=True)):
                sha.update(raw_bytes(piece))
    return sha.digest()


def _whole(sent: Sent, message: Message, payload: bytes) -> str:
    metrics = records_of(message.content, MetricRecord)[METRICS]
    counted = f" in {metrics[CLIENTS]} clients" if CLIENTS in metrics else ""
    steps = f" after {metrics[STEPS]} steps" if STEPS in metrics else ""
    sha = hashlib.sha256(f"{metrics[EXAMPLES]}{counted}{steps}".encode())
    for record in sent.values():
        for name, array in record.items():
            sha.update(_label(name, array.dtype, tuple(array.shape)))
    sha.update(payload)
    return sha.hexdigest()


@lru_cache(maxsize=4096)
def _label(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"\0{name}\0{dtype}\0{shape}\0".encode()
