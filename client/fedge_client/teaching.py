"""The teacher of a lesson: it comes once, and this client keeps it in `Context.state` by its digest."""

from __future__ import annotations

from typing import Final

from flwr.app import ArrayRecord, Context, Message

from fedge.errors import FormatError
from fedge.learning.messages import from_record, teacher_of, to_record
from fedge.learning.state import NamedArrays, digest
from fedge.learning.terms import Terms
from fedge.wire.arrays import put, records_of

KEPT: Final = "teacher"  # arrays: the state of the last lesson's teacher


def taught_by(message: Message, context: Context, terms: Terms) -> NamedArrays | None:
    """The state of the network whose answers are learned; None: this is no lesson.

    Args:
        message: that may bring it.
        context: of this client in this run.
        terms: that the message holds.

    Raises:
        FormatError: it did not come and is not here, or is another than the lesson names.
    """
    if terms.lesson is None:
        return None
    found = teacher_of(message, terms)
    if found is not None:
        if terms.lesson.keep:
            put(context.state, {KEPT: to_record(found)})
        return found
    record = records_of(context.state, ArrayRecord).get(KEPT)
    kept = {} if record is None else from_record(record)
    if digest(kept) != terms.lesson.digest:
        raise FormatError("message: a lesson of a teacher that this device does not hold; it needs the whole")
    return kept
