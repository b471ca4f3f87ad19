"""Take a round's answers as they arrive, until quorum, deadline, or everyone has answered.

One way for all: `collect` hands each valid update on as soon as it is there and keeps none. Who needs them
all at once asks for a list of them (`in_order`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message

from fedge.wire.arrays import nbytes_of, put, records_of
from fedge_server.rounds.digests import arrays_sent, digest_beside, set_digest
from fedge_server.rounds.record import UNASKED, Rejected, Score
from fedge_server.rounds.validation import Rules, UnfitError, Valid, validated


class TooFewError(Exception):
    """The round has closed with too few updates to count; nobody may make a model of them."""


@dataclass(slots=True)
class Collected:
    """What has come back: complete once the updates have been gone through."""

    clients: int = 0  # whose updates came; more than messages where these are partial sums
    asked: int = 0  # who was asked; of asynchronous rounds, whose answer or silence is in
    rejected: list[Rejected] = field(default_factory=list)
    bytes_up: int = 0  # arrays received, rejected ones too
    bytes_down: int = 0  # arrays sent
    digests: list[str] = field(default_factory=list)  # of the valid updates
    norms: list[float] = field(default_factory=list)  # of their changes, where they are measured
    ages: list[int] = field(default_factory=list)  # of updates in asynchronous rounds, in rounds
    facts: Mapping[str, float | str] = field(default_factory=dict)  # of a sum under masks, for the record
    scores: tuple[Score, ...] = ()  # of each update, where they were held against each other
    broke: Exception | None = None  # what the Grid raised

    @property
    def updates(self) -> str:
        """SHA-256 of the anonymous set of valid updates."""
        return set_digest(self.digests)

    @property
    def norm(self) -> float | None:
        """The median of the changes' norms."""
        return statistics.median(self.norms) if self.norms else None


Admit = Callable[[Message, Collected], Valid]
"""Look at a reply, count its bytes, and give the update; raises UnfitError where it must not be used."""


def collect(
    replies: Iterable[Message], admit: Admit, collected: Collected, *, needed: int, once: bool
) -> Iterator[Message]:
    """The valid updates as they arrive, until they hold those of `needed` clients or there are no more.

    The Grid ends its iteration at the deadline. Once the quorum is there, nobody is waited for.

    Args:
        replies: from the Grid, as they arrive.
        admit: decides about each.
        collected: is told of everything.
        needed: clients whose updates close the round.
        once: an update has been used once the next is asked for, and its arrays are let go then.
    """
    with ThreadPoolExecutor(1, "fedge-digest") as executor:  # starts no thread before it has work
        for reply in _watched(replies, collected):
            sent = arrays_sent(reply)
            try:
                valid = admit(reply, collected)
            except UnfitError as error:
                collected.rejected.append(Rejected(reply.metadata.src_node_id, str(error), error.kind))
                continue
            digest = digest_beside(sent, reply, executor)
            if not once:  # some of Flower's strategies empty or change the messages that they aggregate
                collected.digests.append(digest())
            collected.clients += valid.clients
            collected.norms += [] if valid.norm is None else [valid.norm]
            yield reply
            if once:
                collected.digests.append(digest())
                del sent, valid, digest  # each of them has the arrays
                _let_go(reply)
            if collected.clients >= needed:
                return


def singles(rules: Rules, asked: set[int]) -> Admit:
    """Updates of one client each; one that answers twice, or was not asked, is rejected.

    Args:
        rules: of the round.
        asked: node ids.
    """
    accepted: set[int] = set()

    def admit(reply: Message, collected: Collected) -> Valid:
        client = reply.metadata.src_node_id
        collected.bytes_up += payload_bytes(reply)
        if client not in asked:
            raise UnfitError("was not asked", UNASKED)
        if client in accepted:
            raise UnfitError("answered twice; the first answer counts", UNASKED)
        valid = validated(reply, rules)
        accepted.add(client)
        return valid

    return admit


def sums(rules: Rules, asked: set[int]) -> Admit:
    """Partial sums, each of which holds the updates of several clients, and errors of single ones.

    Args:
        rules: against which each sum is held.
        asked: node ids; no more clients than these are counted.
    """
    failed: set[int] = set()

    def admit(reply: Message, collected: Collected) -> Valid:
        client = reply.metadata.src_node_id
        if reply.has_error() and (client not in asked or client in failed):
            raise UnfitError("was not asked, or answered twice", UNASKED)
        try:
            valid = validated(reply, rules, clients=len(asked) - collected.clients - len(failed))
        except UnfitError:
            failed.update({client} if reply.has_error() else ())
            raise
        each = payload_bytes(reply)  # as much as everyone has sent to whoever added up
        collected.bytes_up += valid.clients * each
        return valid

    return admit


def enough(asked: int, quorum: float, at_least: int) -> int:
    """Valid updates that close a round: never fewer than with so many that it counts."""
    return max(math.ceil(quorum * asked - 1e-9), at_least)


def if_enough(updates: Iterable[Message], collected: Collected, least: int) -> Iterator[Message]:
    """The updates, and a veto at their end where they are those of fewer clients.

    Raises:
        TooFewError: whoever is adding them up stops there, before anything comes of it.
    """
    yield from updates
    if collected.clients < least:
        raise TooFewError(f"{collected.clients} updates, and {least} are needed")


def in_order(updates: Iterable[Message]) -> list[Message]:
    """All updates, in the order of their clients: the result must not depend on who came first."""
    return sorted(updates, key=lambda update: update.metadata.src_node_id)


def payload_bytes(message: Message) -> int:
    """Bytes of all arrays in a message; nothing is read or serialised for it."""
    if not message.has_content():
        return 0
    return sum(
        nbytes_of(array)
        for record in records_of(message.content, ArrayRecord).values()
        for array in record.values()
    )


def payload_bytes_of(sent: Sequence[Message]) -> int:
    """The same of messages, which often share one content."""
    if all(message.content is sent[0].content for message in sent):
        return len(sent) * payload_bytes(sent[0]) if sent else 0
    return sum(map(payload_bytes, sent))


def _watched(replies: Iterable[Message], collected: Collected) -> Iterator[Message]:
    """The replies; what the Grid raises is nobody else's fault."""
    try:
        yield from replies
    except Exception as error:
        collected.broke = error
        raise


def _let_go(reply: Message) -> None:
    """Forget the arrays: the Grid remembers its replies, and would keep all clients' models with them.

    Not by emptying the record: a client may have sent back the one that it was sent.
    """
    put(reply.content, {name: ArrayRecord() for name in records_of(reply.content, ArrayRecord)})
