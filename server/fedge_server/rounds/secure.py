"""A round whose answers are added up under masks: five phases over any Grid, and one message with their mean.

Where a sum cannot be opened the round does not count, nothing of it has been seen, and the next begins anew.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedge.config import Config
from fedge.errors import ConfigError, RoundError
from fedge.learning.guard import Guard
from fedge.learning.messages import ARRAYS, CONFIG, EXAMPLES, METRICS, TRAIN_LOSS, to_record
from fedge.noise import derived_key
from fedge.secagg import wire
from fedge.secagg.encoding import EXTRAS, MOST_BITS, Encoding, Sum, decode_whole, unflat
from fedge.secagg.masks import Session, Words
from fedge.secagg.wire import Fields
from fedge.wire.arrays import records_of
from fedge_server.privacy.protection import Protection
from fedge_server.privacy.rules import guard_of_shares, least_of
from fedge_server.rounds.closing import Collected, enough, payload_bytes
from fedge_server.rounds.digests import arrays_sent, digest_of
from fedge_server.rounds.record import PROTOCOL, UNASKED, Rejected
from fedge_server.rounds.validation import Arrays, declared_fault, error_kind, error_of
from fedge_server.secagg.coordinator import Coordinator

_log = logging.getLogger("fedge.rounds")
Take = Callable[[int, Message], str | None]
"""Hand a client's reply to the coordinator; the reason why it was refused, or None."""


def encoding_of(config: Config, clients: int) -> Encoding:
    """How so many clients' changes become numbers.

    Raises:
        ConfigError: they would not fit.
    """
    privacy = config.privacy
    if privacy.mechanism == "distributed":
        most = guard_of_shares(config, clients).largest_share * clients
        if most >= 2**MOST_BITS:
            raise ConfigError(
                f"privacy.noise_multiplier = {privacy.noise_multiplier:g}: {clients} clients' shares "
                f"make up to {most:.3g} steps, which must stay below 2^31; raise it or rounds.min_updates"
            )
    try:
        return Encoding(privacy.secure_range, privacy.secure_examples, clients)
    except ValueError as error:
        raise ConfigError(
            f"privacy.secure_examples = {privacy.secure_examples}: {error}; lower it, or ask fewer clients"
        ) from error


def secure_sum(
    grid: Grid, config: Config, run_id: str, number: int, sent: Sequence[Message], origin: Arrays, *,
    protection: Protection | None, simulated: bool, signed: bool,
) -> tuple[list[Message], Collected]:  # fmt: skip
    """The weighted mean of what these clients' training gives, of which nobody sees a part.

    Args:
        grid: carries the messages.
        config: of the run.
        run_id: that the session is bound to.
        number: of the round.
        sent: one train message for each client, as the strategy made them.
        origin: what changes are measured from.
        protection: of the run; with distributed noise it says what devices were told.
        simulated: nonce and graph come from the seed.
        signed: clients sign their keys with the identity that their id is the hash of.

    Returns:
        The mean as one update, or none where the sum stayed closed; and what came back.
    """
    privacy = config.privacy
    if simulated:
        drawn = derived_key("secagg", config.seed, run_id, number)
        nonce, draw = drawn[: wire.NONCE_BYTES], random.Random(drawn)  # noqa: S311 - repeatable on purpose
    else:
        nonce, draw = secrets.token_bytes(wire.NONCE_BYTES), random.SystemRandom()
    clients = frozenset(message.metadata.dst_node_id for message in sent)
    size = sum(value.size for value in origin.values())
    noise = None
    if protection is not None and protection.guard is not None and protection.guard.kind == "distributed":
        noise = protection.guard, protection.expected
    least = least_of(config, len(clients) if noise is None else noise[1])
    coordinator = Coordinator(
        Session(run_id, number, nonce), clients, size + EXTRAS, least, draw,
        privacy.secure_corrupt, privacy.secure_dropouts, privacy.secure_neighbours, signed,
    )  # fmt: skip
    phases = _Phases(
        grid, config, coordinator, {message.metadata.dst_node_id: message for message in sent}, noise
    )
    try:
        found = phases.run()
    except RoundError as error:
        _log.warning("round %d: %s", number, error)
        return phases.result([], 0, {"aborted": str(error), "secure_least": least})
    return phases.result([_message(found, origin)], found.clients, phases.facts(found))


@dataclass(slots=True)
class _Phases:
    """The phases of one session, and what they cost."""

    grid: Grid
    config: Config
    coordinator: Coordinator
    training: Mapping[int, Message]
    noise: tuple[Guard, int] | None  # distributed noise: what devices were told, and the fixed denominator
    rejected: list[Rejected] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0

    def run(self) -> Sum:
        """All phases, one after the other.

        Raises:
            RoundError: a threshold was missed, and nothing was opened.
        """
        server, session = self.coordinator, self.coordinator.session
        encoding = encoding_of(self.config, len(self.training))
        first = wire.record_of(session)
        config = records_of(next(iter(self.training.values())).content, ConfigRecord)[CONFIG]
        begin = dict.fromkeys(self.training, RecordDict({wire.RECORD: first, CONFIG: config}))
        needed = enough(len(self.training), self.config.rounds.quorum, server.least)
        self.ask(wire.KEYS, begin, self.take_keys, lambda taken: taken >= needed)
        near, threshold = server.for_shares()
        shares = {i: wire.for_shares(session, others, threshold) for i, others in near.items()}
        self.ask(wire.SHARES, _contents(shares), lambda i, reply: server.take_shares(
            i, wire.dealt_of(Fields.of(reply), list(near[i]))))  # fmt: skip
        boxes = {i: wire.for_check(session, found) for i, found in server.for_check().items()}
        self.ask(wire.CHECK, _contents(boxes), lambda i, reply: server.take_check(
            i, Fields.of(reply).ids("good")))  # fmt: skip
        trains = {}
        for i, partners in server.for_masking().items():
            content = self.training[i].content.copy()
            content[wire.RECORD] = wire.for_masking(session, partners, encoding)
            trains[i] = content
        self.ask(MessageType.TRAIN, trains, self.take_masked, lambda taken: taken >= needed)
        opening = server.for_unmasking()
        opens = {i: wire.for_unmasking(session, *told) for i, told in opening.items()}
        self.ask(wire.UNMASK, _contents(opens), lambda i, reply: server.take_revealed(
            i, wire.revealed_of(Fields.of(reply), *opening[i])), lambda _: server.ready)  # fmt: skip
        found = self.decode(encoding, server.open())
        if found.clients != len(server.present) or found.examples < found.clients or found.cut < 0:
            raise RoundError(
                f"secure aggregation: the sum counts {found.clients} clients with {found.examples} examples, "
                f"and {len(server.present)} sent a change: one of them did not encode as it should"
            )
        return found

    def decode(self, encoding: Encoding, total: Words) -> Sum:
        """What the opened sum says."""
        if self.noise is None:
            return encoding.decode(total)
        guard, expected = self.noise
        return decode_whole(total, guard.share_step, expected)

    def ask(
        self,
        kind: str,
        contents: Mapping[int, RecordDict],
        take: Take,
        done: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """One phase: send, and take answers until all have answered, the deadline, or it is `done`."""
        sent = [Message(contents[client], client, kind) for client in sorted(contents)]
        self.bytes_down += sum(
            payload_bytes(message) + wire.payload_bytes(message.content) for message in sent
        )
        waiting, taken = set(contents), 0
        for reply in self.grid.send_and_receive(sent, timeout=self.config.rounds.deadline_s):
            client = reply.metadata.src_node_id
            if client not in waiting:
                self.rejected.append(Rejected(client, "was not asked, or answered twice", UNASKED))
                continue
            waiting.discard(client)
            reason: str | None
            if reply.has_error():
                reason, fault = error_of(reply), error_kind(reply)
            else:
                fault = PROTOCOL
                self.bytes_up += payload_bytes(reply) + wire.payload_bytes(reply.content)
                try:
                    reason = take(client, reply)
                except Exception as error:  # noqa: BLE001 - it rejects the client, not the round
                    reason = f"{kind}: cannot be read ({type(error).__name__}: {error})"[:300]
            if reason is not None:
                self.rejected.append(Rejected(client, reason, fault))
                continue
            taken += 1
            if done(taken):
                break

    def take_keys(self, client: int, reply: Message) -> str | None:
        """A client's public keys."""
        return self.coordinator.take_keys(client, wire.keys_of(Fields.of(reply).read("keys", bytes)))

    def take_masked(self, client: int, reply: Message) -> str | None:
        """A client's masked change, which is looked at only after what it declares of itself."""
        record = records_of(reply.content, ArrayRecord)[ARRAYS]
        if list(record) != [wire.MASKED]:
            return f"masked change: arrays {sorted(record)[:3]} instead of {[wire.MASKED]}"
        expected = np.broadcast_to(np.uint32(0), (self.coordinator.length,))
        if (fault := declared_fault(record[wire.MASKED], expected)) is not None:
            return f"masked change: {fault}"
        return self.coordinator.take_masked(client, record[wire.MASKED].numpy())

    def facts(self, found: Sum) -> dict[str, float | str]:
        """What a round's record says of its protection."""
        server = self.coordinator
        degree = server.degree
        assert degree is not None  # noqa: S101 - the sum was opened
        encoding = encoding_of(self.config, len(self.training))
        return {
            "secure_neighbours": degree.neighbours,
            "secure_threshold": degree.threshold,
            "secure_least": server.least,
            "secure_lost": len(self.training) - len(server.present),
            "secure_cut": found.cut,
            **({"secure_error": encoding.error(found.clients, found.examples)} if self.noise is None else {}),
        }

    def result(
        self, valid: list[Message], clients: int, facts: Mapping[str, float | str]
    ) -> tuple[list[Message], Collected]:
        """What the round's loop goes on with."""
        digests = [digest_of(arrays_sent(message), message) for message in valid]
        return valid, Collected(
            clients,
            asked=len(self.training),
            rejected=self.rejected,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            digests=digests,
            facts=facts,
        )


def _contents(records: Mapping[int, ConfigRecord]) -> dict[int, RecordDict]:
    return {client: RecordDict({wire.RECORD: record}) for client, record in records.items()}


def _message(found: Sum, origin: Arrays) -> Message:
    metrics = MetricRecord({EXAMPLES: found.examples, TRAIN_LOSS: max(found.loss, 0.0)})
    arrays = to_record(unflat(found.mean, origin), shared=False)
    return Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), 1, MessageType.TRAIN)
