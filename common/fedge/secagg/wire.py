"""Secure aggregation inside Flower messages: one config record for each phase, bounded when it is read.

| message type | server sends (record `secagg`) | client replies |
|---|---|---|
| query.secagg_keys | session; config (record `config`) | its keys |
| query.secagg_shares | session, threshold, neighbours and their keys | a box for each, in their order |
| query.secagg_check | session, dealers and their boxes | the dealers whose shares are in order |
| train | session, partners, encoding; arrays and config as ever | arrays: `masked`, uint32 |
| query.secagg_unmask | session, present, lost | a share for each, in their order |
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.errors import FormatError
from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS, TRAIN_LOSS, to_record
from fedge.secagg.encoding import Encoding
from fedge.secagg.masks import KEY_BYTES, Session, Words
from fedge.secagg.protocol import BOX_BYTES, Box, Dealt, Keys, Revealed
from fedge.secagg.shamir import MAX_SHARES, SECRET_BYTES
from fedge.wire.arrays import records_of

RECORD: Final = "secagg"
MASKED: Final = "masked"  # the one array of a masked change
KEYS, SHARES, CHECK, UNMASK = (f"query.secagg_{phase}" for phase in ("keys", "shares", "check", "unmask"))
NONCE_BYTES: Final = 16
_IDENTITY: Final = 33
_BOX: Final = BOX_BYTES + 2 * SECRET_BYTES


class Fields:
    """The record of a message, whose values are checked as they are read."""

    def __init__(self, record: ConfigRecord) -> None:
        self._record = record

    @classmethod
    def of(cls, message: Message) -> Fields:
        """That of a message.

        Raises:
            FormatError: it has none.
        """
        found = records_of(message.content, ConfigRecord).get(RECORD)
        if found is None:
            raise FormatError("secure aggregation: the message has no record for it")
        return cls(found)

    def has(self, name: str) -> bool:
        """Whether there is such a value."""
        return name in self._record

    def read(self, name: str, kind: type[Any]) -> Any:
        """A value of a type.

        Raises:
            FormatError: it is absent or of another type, as all methods below.
        """
        value = self._record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FormatError(f"secure aggregation: {name} is {type(value).__name__}, not {kind.__name__}")
        return value

    def session(self) -> Session:
        """The session that the message belongs to."""
        run, number, nonce = self.read("run", str), self.read("round", int), self.read("nonce", bytes)
        if len(nonce) != NONCE_BYTES or not 0 <= number < 2**62 or len(run) > 512:
            raise FormatError("secure aggregation: run, round or nonce is out of range")
        return Session(run, number, nonce)

    def ids(self, name: str) -> list[int]:
        """Node ids, each once."""
        data = self.read(name, bytes)
        if len(data) % 8 or len(data) > 8 * MAX_SHARES:
            raise FormatError(f"secure aggregation: {name} has {len(data)} bytes")
        found: list[int] = np.frombuffer(data, "<u8").tolist()
        if len(set(found)) != len(found):
            raise FormatError(f"secure aggregation: {name} names a client twice")
        return found

    def parts(self, name: str, size: int, count: int) -> list[bytes]:
        """So many pieces of one size."""
        data = self.read(name, bytes)
        if len(data) != size * count:
            raise FormatError(f"secure aggregation: {name} has {len(data)} bytes instead of {size * count}")
        return [data[at : at + size] for at in range(0, len(data), size)]

    def keys(self, name: str, count: int) -> list[Keys]:
        """So many clients' keys."""
        value = self.read(name, list)
        if len(value) != count or not all(isinstance(part, bytes) for part in value):
            raise FormatError(f"secure aggregation: {name} are not {count} clients' keys")
        return [keys_of(part) for part in value]

    def encoding(self) -> Encoding:
        """How values become numbers."""
        try:
            return Encoding(self.read("range", float), self.read("examples", int), self.read("clients", int))
        except ValueError as error:
            raise FormatError(f"secure aggregation: {error}") from error


def record_of(session: Session, **values: Any) -> ConfigRecord:
    """A session and further values as a record."""
    return ConfigRecord({"run": session.run, "round": session.round, "nonce": session.nonce, **values})


def ids_bytes(ids: Iterable[int]) -> bytes:
    """Node ids, 8 bytes each."""
    return np.fromiter(ids, np.uint64).astype("<u8").tobytes()


def keys_bytes(keys: Keys) -> bytes:
    """A client's keys: 96 bytes, or about 200 with a signature."""
    return keys.channel + keys.mask + keys.seed + keys.identity + keys.signature


def keys_of(data: bytes) -> Keys:
    """Read what `keys_bytes` wrote.

    Raises:
        FormatError: it has no such form.
    """
    channel, mask, seed, rest = data[:32], data[32:64], data[64:96], data[3 * KEY_BYTES :]
    return Keys(channel, mask, seed, rest[:_IDENTITY], rest[_IDENTITY:])


def box_bytes(box: Box) -> bytes:
    """A box and its commitments: 144 bytes."""
    return box.sealed + box.seed + box.key


def box_of(data: bytes) -> Box:
    """Read what `box_bytes` wrote."""
    return Box(data[:BOX_BYTES], data[BOX_BYTES : BOX_BYTES + 32], data[BOX_BYTES + 32 :])


def for_shares(session: Session, near: Mapping[int, Keys], threshold: int) -> ConfigRecord:
    """What a client is sent in the phase of shares."""
    return record_of(
        session, threshold=threshold, ids=ids_bytes(near), keys=[keys_bytes(keys) for keys in near.values()]
    )


def for_check(session: Session, boxes: Mapping[int, Box]) -> ConfigRecord:
    """What a client is sent in the phase of the check."""
    return record_of(session, ids=ids_bytes(boxes), boxes=b"".join(map(box_bytes, boxes.values())))


def for_masking(session: Session, partners: Collection[int], encoding: Encoding) -> ConfigRecord:
    """What a client is sent along with the model."""
    return record_of(
        session,
        partners=ids_bytes(sorted(partners)),
        range=encoding.largest,
        examples=encoding.most_examples,
        clients=encoding.clients,
    )


def for_unmasking(session: Session, present: Collection[int], lost: Collection[int]) -> ConfigRecord:
    """What a client is sent in the phase of unmasking."""
    return record_of(session, present=ids_bytes(sorted(present)), lost=ids_bytes(sorted(lost)))


def boxes_of(fields: Fields) -> dict[int, Box]:
    """The boxes that a client was sent, by dealer."""
    ids = fields.ids("ids")
    return dict(zip(ids, map(box_of, fields.parts("boxes", _BOX, len(ids))), strict=True))


def reply(message: Message, **values: Any) -> Message:
    """A client's answer in a phase other than that of the masked change."""
    return Message(RecordDict({RECORD: ConfigRecord(values)}), reply_to=message)


def dealt_values(dealt: Dealt, order: Sequence[int]) -> dict[str, bytes]:
    """A dealer's answer, its boxes in the order of its neighbours."""
    boxes = b"".join(box_bytes(dealt.boxes[other]) for other in order)
    return {"boxes": boxes, "own": dealt.own_seed + dealt.own_key}


def dealt_of(fields: Fields, order: Sequence[int]) -> Dealt:
    """Read a dealer's answer."""
    boxes = map(box_of, fields.parts("boxes", _BOX, len(order)))
    return Dealt(dict(zip(order, boxes, strict=True)), *fields.parts("own", SECRET_BYTES, 2))


def revealed_values(revealed: Revealed) -> dict[str, bytes]:
    """Shares, in ascending order of their dealers."""
    return {
        name: b"".join(shares[dealer] for dealer in sorted(shares))
        for name, shares in (("seeds", revealed.seeds), ("keys", revealed.keys))
    }


def revealed_of(fields: Fields, present: Collection[int], lost: Collection[int]) -> Revealed:
    """Read shares that were asked of a client."""
    seeds = fields.parts("seeds", SECRET_BYTES, len(present))
    keys = fields.parts("keys", SECRET_BYTES, len(lost))
    return Revealed(
        dict(zip(sorted(present), seeds, strict=True)), dict(zip(sorted(lost), keys, strict=True))
    )


def masked_reply(message: Message, masked: Words) -> Message:
    """A client's change under masks; its examples and loss are inside."""
    metrics = MetricRecord({EXAMPLES: 1, TRAIN_LOSS: 0.0})
    return Message(
        RecordDict({ARRAYS: to_record({MASKED: masked}, shared=False), METRICS: metrics}), reply_to=message
    )


def payload_bytes(content: RecordDict) -> int:
    """Bytes of keys, boxes, ids and shares in a message."""
    record = records_of(content, ConfigRecord).get(RECORD, ConfigRecord())
    values = (part for value in record.values() for part in (value if isinstance(value, list) else [value]))
    return sum(len(part) for part in values if isinstance(part, bytes))
