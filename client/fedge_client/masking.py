"""The phases of secure aggregation as a client answers them; what it must remember is in the context's state.

The state holds the secrets of one session, and is overwritten by the next: they open masks that have long
been taken off. A round's change is sent once: a round that is begun anew, since the server died in it, goes
without the clients that had sent theirs, since two sums with and without a third client would show that one.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedge.errors import FormatError
from fedge.secagg import wire
from fedge.secagg.encoding import Encoding
from fedge.secagg.masks import Session, Words
from fedge.secagg.protocol import Signer
from fedge.secagg.shamir import SECRET_BYTES
from fedge.secagg.wire import Fields
from fedge.wire.arrays import records_of
from fedge_client.secagg import Member


def is_asked_for(message: Message) -> bool:
    """Whether a train message asks for a masked change."""
    return wire.RECORD in records_of(message.content, ConfigRecord)


def answer_queries(
    client: ClientApp, root: Callable[[Message, Context], bytes], signer: Callable[[], Signer | None]
) -> None:
    """Let an app answer all phases but that of the masked change, which is its training.

    Args:
        client: the app.
        root: draws the secret of a session.
        signer: the device's identity, if it has one.
    """

    @client.query(wire.KEYS.removeprefix("query."))
    def keys(message: Message, context: Context) -> Message:
        return answer_keys(message, context, lambda: root(message, context), signer())

    @client.query(wire.SHARES.removeprefix("query."))
    def shares(message: Message, context: Context) -> Message:
        return answer_shares(message, context, signer())

    client.query(wire.CHECK.removeprefix("query."))(answer_check)
    client.query(wire.UNMASK.removeprefix("query."))(answer_unmask)


def answer_keys(
    message: Message, context: Context, root: Callable[[], bytes], signer: Signer | None
) -> Message:
    """Begin a session, or answer again in the one that is under way.

    Args:
        message: of the server.
        context: of this client in this run.
        root: draws the secret of a session.
        signer: the device's identity, if it has one.
    """
    session = Fields.of(message).session()
    sent, member = _remembered(context, signer)
    if session.round <= sent:
        raise FormatError(
            f"secure aggregation: a change of round {sent} was sent, round {session.round} is over"
        )
    if member is None or member.session != session:
        member = Member(context.node_id, session, root(), signer)
    _remember(context, sent, member)
    return wire.reply(message, keys=wire.keys_bytes(member.keys()))


def answer_shares(message: Message, context: Context, signer: Signer | None) -> Message:
    """Deal shares of this client's secrets to its neighbours."""
    fields, sent, member = _going_on(message, context, signer)
    ids = fields.ids("ids")
    near = dict(zip(ids, fields.keys("keys", len(ids)), strict=True))
    dealt = member.deal(near, fields.read("threshold", int))
    _remember(context, sent, member)
    return wire.reply(message, **wire.dealt_values(dealt, ids))


def answer_check(message: Message, context: Context) -> Message:
    """Say whose shares are in order."""
    fields, sent, member = _going_on(message, context)
    good = member.check(wire.boxes_of(fields))
    _remember(context, sent, member)
    return wire.reply(message, good=wire.ids_bytes(sorted(good)))


def answer_masked(message: Message, context: Context, encode: Callable[[Encoding], Words]) -> Message:
    """Send a change under masks.

    Args:
        message: of type train.
        context: of this client in this run.
        encode: what training gave, as numbers.
    """
    fields, _, member = _going_on(message, context)
    masked = member.mask(encode(fields.encoding()), fields.ids("partners"))
    _remember(context, member.session.round, member)
    return wire.masked_reply(message, masked)


def answer_unmask(message: Message, context: Context) -> Message:
    """Give one share for each of the neighbourhood."""
    fields, sent, member = _going_on(message, context)
    revealed = member.reveal(fields.ids("present"), fields.ids("lost"))
    _remember(context, sent, member)
    return wire.reply(message, **wire.revealed_values(revealed))


def _going_on(message: Message, context: Context, signer: Signer | None = None) -> tuple[Fields, int, Member]:
    fields = Fields.of(message)
    sent, member = _remembered(context, signer)
    session: Session = fields.session()
    if member is None or member.session != session:
        raise FormatError(f"secure aggregation: this client is in no such session of round {session.round}")
    return fields, sent, member


def _remember(context: Context, sent: int, member: Member) -> None:
    values = {
        "sent": sent,
        "root": member.root,
        "threshold": member.threshold,
        "ids": wire.ids_bytes(member.neighbours),
        "keys": [wire.keys_bytes(keys) for keys in member.neighbours.values()],
        "held-ids": wire.ids_bytes(member.held),
        "held": b"".join(seed + key for seed, key in member.held.values()),
    }
    if member.partners is not None:
        values["partners"] = wire.ids_bytes(sorted(member.partners))
    if member.told is not None:
        values["present"], values["lost"] = (wire.ids_bytes(sorted(ids)) for ids in member.told)
    context.state[wire.RECORD] = wire.record_of(member.session, **values)


def _remembered(context: Context, signer: Signer | None) -> tuple[int, Member | None]:
    """The last round in which a change was sent, and the session under way."""
    record = records_of(context.state, ConfigRecord).get(wire.RECORD)
    if record is None:
        return -1, None
    fields = Fields(record)
    ids, held = fields.ids("ids"), fields.ids("held-ids")
    shares = fields.parts("held", 2 * SECRET_BYTES, len(held))
    member = Member(
        context.node_id,
        fields.session(),
        fields.read("root", bytes),
        signer,
        dict(zip(ids, fields.keys("keys", len(ids)), strict=True)),
        fields.read("threshold", int),
        {i: (s[:SECRET_BYTES], s[SECRET_BYTES:]) for i, s in zip(held, shares, strict=True)},
        frozenset(fields.ids("partners")) if fields.has("partners") else None,
        (frozenset(fields.ids("present")), frozenset(fields.ids("lost"))) if fields.has("present") else None,
    )
    return fields.read("sent", int), member
