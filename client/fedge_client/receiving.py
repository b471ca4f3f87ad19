"""The global state as it reaches a client: whole, or as the change since the last one, which it has kept.

Where a run asks for it, the state holds the last global state that this client trained from. A message with a
change says what it is measured from and what it gives; a client that holds neither answers with an error, and
is sent the whole state the next time.
"""

from __future__ import annotations

from typing import Final

from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord
from torch import nn

from fedge.codecs.layout import Layout
from fedge.codecs.stages import key_of
from fedge.codecs.update import checksum, decode
from fedge.errors import FormatError
from fedge.learning import local
from fedge.learning.messages import (
    ARRAYS,
    CODED,
    HOLDS_FROZEN,
    METRICS,
    Instructions,
    arrays_named,
    from_record,
    frozen_of,
    to_record,
)
from fedge.learning.state import NamedArrays
from fedge.learning.terms import FROZEN
from fedge.wire.arrays import put, raw_bytes, records_of

HELD: Final = "held"  # arrays: the last global state
HELD_FROZEN: Final = "held-frozen"  # arrays: its frozen part, which never changes


def travelled(
    message: Message, context: Context, instructions: Instructions, model: nn.Module
) -> NamedArrays:
    """The global state that a message stands for; that of training is kept if the run sends changes.

    Args:
        message: of type train or evaluate.
        context: of this client in this run.
        instructions: that the message holds.
        model: of the run's architecture.

    Raises:
        FormatError: the change is from a state that this client does not hold, or is none.
    """
    arrays = from_record(arrays_named(message.content, ARRAYS))
    if instructions.downlink is None or message.metadata.message_type != MessageType.TRAIN:
        return arrays
    if instructions.change is not None:
        arrays = _changed(arrays, context, instructions, local.parameters_of(model))
    put(context.state, {HELD: to_record(arrays)})
    return arrays


def frozen(message: Message, context: Context, instructions: Instructions) -> NamedArrays:
    """The frozen part of the global state: as it came, or as it is kept; kept when it comes to train with.

    Raises:
        FormatError: neither, or what is kept is another one.
    """
    terms = instructions.terms
    if not terms.frozen or FROZEN in message.content or instructions.frozen_sum is None:
        found = frozen_of(message, terms)
        if (
            found
            and instructions.frozen_sum is not None
            and message.metadata.message_type == MessageType.TRAIN
        ):
            put(context.state, {HELD_FROZEN: to_record(found)})
        return found
    kept = records_of(context.state, ArrayRecord).get(HELD_FROZEN)
    held = {} if kept is None else from_record(kept)
    if set(held) != set(terms.frozen) or checksum(held) != instructions.frozen_sum:
        raise FormatError(
            "message: without the frozen arrays, which this device does not hold; it needs them"
        )
    return held


def holding(reply: Message, context: Context, instructions: Instructions) -> Message:
    """The reply, which says so where this client keeps the frozen arrays as it was asked to."""
    if instructions.frozen_sum is not None and HELD_FROZEN in context.state:
        records_of(reply.content, MetricRecord)[METRICS][HOLDS_FROZEN] = 1
    return reply


def _changed(
    arrays: NamedArrays, context: Context, instructions: Instructions, parameters: frozenset[str]
) -> NamedArrays:
    assert instructions.change is not None  # noqa: S101 - the caller has looked
    assert instructions.downlink is not None  # noqa: S101 - likewise
    base, state = instructions.change
    kept = records_of(context.state, ArrayRecord).get(HELD)
    held = {} if kept is None else from_record(kept)
    if held and checksum(held) == state:  # nothing has changed, or this round is asked for again
        return held
    if not held or checksum(held) != base:
        raise FormatError("message: a change from a state that this device does not hold; it needs the whole")
    if list(arrays) != [CODED]:
        raise FormatError(f"message: arrays {sorted(arrays)[:3]} instead of {[CODED]}")
    key = key_of(instructions.seed, base, 0)
    layout = Layout.of(held, parameters)
    found = decode(bytes(raw_bytes(arrays[CODED])), layout, instructions.downlink, key=key)
    if checksum(found) != state:
        raise FormatError("message: the change does not give the state that it should; it needs the whole")
    return found
