"""How many bytes messages have, both ways: what the simulated clock counts their travel by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedge.codecs.update import estimated_bytes
from fedge.config import parse_train
from fedge.learning.messages import (
    ARRAYS,
    CONFIG,
    MOST_EXAMPLES,
    STATE_BYTES,
    arrays_named,
    codec_of,
    from_record,
)
from fedge.learning.terms import TEACHER
from fedge.wire.arrays import nbytes_of, records_of
from fedge_server.rounds.closing import payload_bytes


def sized(messages: Iterable[Message]) -> Iterator[tuple[tuple[str, int], Message]]:
    """Messages with their types and the bytes of their arrays."""
    sizes: dict[int, tuple[RecordDict, int]] = {}  # by identity: one content goes to many clients
    for message in messages:
        content = message.content
        if id(content) not in sizes:
            sizes[id(content)] = (content, payload_bytes(message))
        yield (message.metadata.message_type, sizes[id(content)][1]), message


def most_examples(message: Message) -> float:
    """That a client is told to train on at most; infinite: it trains on all it has."""
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    told = None if config is None else config.get(MOST_EXAMPLES)
    return float(told) if isinstance(told, int) else math.inf


def passes(message: Message) -> int:
    """That clients make over their data, where they are told to train."""
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    told = None if config is None else config.get("train")
    return _epochs(told) if isinstance(told, str) else 1


@lru_cache(maxsize=16)
def _epochs(train: str) -> int:
    return parse_train(train).epochs


def answer_bytes(message: Message, size: int) -> int:
    """Bytes that come back for a state of this size: as many, or about what a codec makes of them."""
    if message.metadata.message_type != MessageType.TRAIN:
        return 0
    config = records_of(message.content, ConfigRecord).get(CONFIG)
    codec = None if config is None else codec_of(config)
    if config is None or codec is None:
        sent = records_of(message.content, ArrayRecord).get(TEACHER)
        return size if sent is None else size - sum(map(nbytes_of, sent.values()))
    if (whole := config.get(STATE_BYTES)) is not None:  # a change was sent, and says how large the state is
        return estimated_bytes({"": np.broadcast_to(np.float32(0), (1, int(whole) // 4))}, codec)  # type: ignore[arg-type]
    return estimated_bytes(from_record(arrays_named(message.content, ARRAYS)), codec)
