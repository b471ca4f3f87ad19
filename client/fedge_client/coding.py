"""An update in a codec, as a client sends it; what it does not say is kept in the context's state.

The state holds the residual after the last round that this client answered, and that answer itself. A round
that is asked for again, since the server died in it, gets the same answer again: nothing is withheld twice,
and nothing that was withheld is sent twice. An answer that the server does not count (it came too late, or
the round failed) is lost, as it is without a codec; what was withheld of it is not, and comes with the next.
"""

from __future__ import annotations

from typing import Any, Final, Unpack

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message

from fedge.codecs.layout import Change, Layout, NamedArrays
from fedge.codecs.stages import key_of
from fedge.codecs.update import checksum, encode
from fedge.errors import FormatError
from fedge.learning.messages import (
    ARRAYS,
    CODED,
    Instructions,
    arrays_named,
    from_record,
    to_record,
)
from fedge.learning.replies import Said, train_reply
from fedge.wire.arrays import put, records_of

RECORD: Final = "codec"  # arrays: residual, sent
SENT: Final = "codec-sent"  # config: what the answer was to, and what else it said


def answered(message: Message, context: Context, instructions: Instructions) -> Message | None:
    """The answer that was given in this round already, to the same global state.

    Args:
        message: of type train.
        context: of this client in this run.
        instructions: that the message holds.
    """
    kept: Any = records_of(context.state, ConfigRecord).get(SENT)
    if kept is None or (kept["round"], kept["state"]) != (
        instructions.round,
        _state_of(message, instructions),
    ):
        return None
    sent = records_of(context.state, ArrayRecord)[RECORD]["sent"].numpy()
    said: Said = {"examples": kept["examples"], "loss": kept["loss"], "guarded": kept["guarded"]}
    if "steps" in kept:
        said["steps"] = kept["steps"]
    return train_reply(message, {CODED: sent}, **said)


def answer(
    message: Message,
    context: Context,
    layout: Layout,
    arrays: NamedArrays,
    **said: Unpack[Said],
) -> Message:
    """Send an update in the codec that the message asks for, and keep what it leaves out.

    Args:
        message: of type train; its instructions name a codec.
        context: of this client in this run.
        layout: what changes are measured from.
        arrays: what would be sent whole; protected already, if the client guards itself.
        said: with it.

    Raises:
        ValueError: the change is not finite.
    """
    instructions = Instructions.of(message)
    codec = instructions.codec
    if codec is None:
        raise FormatError("message: asks for no codec")
    key = key_of(instructions.seed, instructions.round, context.node_id)
    coded = encode(arrays, layout, codec, key=key, residual=_residual(context, layout))
    sent = np.frombuffer(coded.data, np.uint8)
    if coded.residual is not None:
        record = to_record({"residual": coded.residual, "sent": sent})
        about: dict[str, Any] = {
            "round": instructions.round,
            "state": _state_of(message, instructions),
            **said,
        }
        put(context.state, {RECORD: record, SENT: ConfigRecord(about)})
    return train_reply(message, {CODED: sent}, **said)


def _residual(context: Context, layout: Layout) -> Change | None:
    """What was left of the last change; None where nothing was, or of another model."""
    kept = records_of(context.state, ArrayRecord).get(RECORD)
    if kept is None:
        return None
    found: Change = kept["residual"].numpy()
    return found if found.shape == (layout.size,) else None


def _state_of(message: Message, instructions: Instructions) -> int:
    """A checksum of the global state that a message brings."""
    if instructions.change is not None:
        return instructions.change[1]
    return checksum(from_record(arrays_named(message.content, ARRAYS)))
