"""Collect a round's answers as they arrive, until quorum, deadline, or everyone has answered."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS
from fedge_server.rounds.record import Rejected
from fedge_server.rounds.validation import Arrays, fault


@dataclass(frozen=True, slots=True)
class Collected:
    """What came back before the round closed."""

    valid: list[Message]  # updates to aggregate, in the order of their clients
    rejected: tuple[Rejected, ...]
    bytes_up: int  # arrays received, rejected ones too

    def digest(self) -> str:
        """SHA-256 of the anonymous set of updates: their own digests, sorted, without any client's name."""
        each = sorted(_digest(message) for message in self.valid)
        return hashlib.sha256("".join(each).encode()).hexdigest()


def collect(replies: Iterable[Message], *, like: Arrays, asked: set[int], quorum: float) -> Collected:
    """Take replies until a share `quorum` of those asked has sent a valid update, or there are no more.

    The Grid ends its iteration at the deadline. Once the quorum is there, nobody is waited for; a client
    that answers twice, or was not asked, is rejected.

    Args:
        replies: from the Grid, as they arrive.
        like: the global state, against which each update is held.
        asked: node ids that were asked.
        quorum: above 0, at most 1.
    """
    needed = math.ceil(quorum * len(asked) - 1e-9)
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
        elif (reason := fault(reply, like)) is not None:
            rejected.append(Rejected(client, reason))
        else:
            valid[client] = reply
            if len(valid) >= needed:
                break
    # Sums are not associative in floating point: a fixed order makes the result independent of arrival.
    return Collected([valid[client] for client in sorted(valid)], tuple(rejected), received)


def payload_bytes(message: Message) -> int:
    """Bytes of all arrays in a message, as they are serialised."""
    if not message.has_content():
        return 0
    return sum(
        len(array.data) for record in message.content.array_records.values() for array in record.values()
    )


def _digest(message: Message) -> str:
    sha = hashlib.sha256(str(message.content.metric_records[METRICS][EXAMPLES]).encode())
    record: ArrayRecord = message.content.array_records[ARRAYS]
    for name, array in record.items():
        sha.update(name.encode())
        sha.update(array.data)
    return sha.hexdigest()
