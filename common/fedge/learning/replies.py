"""What clients answer: the replies of `messages`' table, and moments as they are read."""

from __future__ import annotations

from math import prod
from typing import NotRequired, TypedDict

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from fedge.errors import FormatError
from fedge.learning.messages import (
    ARRAYS,
    CLIENTS,
    EXAMPLES,
    GUARDED,
    HELD_OUT,
    MAX_EXAMPLES,
    METRICS,
    MOMENTS,
    TRAIN_LOSS,
    NamedArrays,
    arrays_named,
    from_record,
    to_record,
)
from fedge.learning.terms import CONTROL, STEPS
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.wire.arrays import records_of


def ping_reply(message: Message) -> Message:
    """A client's answer to query.ping."""
    return Message(content=RecordDict({METRICS: MetricRecord({EXAMPLES: 0})}), reply_to=message)


def moments_reply(message: Message, moments: Moments, examples: int) -> Message:
    """A client's answer to query.moments."""
    arrays = {"count": moments.count, "total": moments.total, "squares": moments.squares}
    content = RecordDict({MOMENTS: to_record(arrays), METRICS: MetricRecord({EXAMPLES: examples})})
    return Message(content=content, reply_to=message)


def moments_of(reply: Message, spec: Spec) -> Moments:
    """Read a client's answer to query.moments.

    Raises:
        FormatError: an array is absent, not float64 of the spec's width, or holds what no data can give.
    """
    try:
        arrays = from_record(arrays_named(reply.content, MOMENTS))
        count, total, squares = (arrays[name] for name in ("count", "total", "squares"))
        examples = records_of(reply.content, MetricRecord)[METRICS][EXAMPLES]
    except (KeyError, ValueError) as error:
        raise FormatError(f"moments: malformed ({type(error).__name__}: {error})") from error
    if any(part.dtype != np.float64 or part.shape != (spec.channels,) for part in (count, total, squares)):
        raise FormatError(f"moments: must be three float64 vectors of width {spec.channels}")
    if not isinstance(examples, int) or not 1 <= examples <= MAX_EXAMPLES:
        raise FormatError(f"moments: {EXAMPLES} is {examples!r}; it must be from 1 to {MAX_EXAMPLES}")
    found = Moments(*(part.astype(np.float64) for part in (count, total, squares)))
    if not _possible(found, examples, spec):
        raise FormatError(f"moments: hold values that no data can give ({examples} examples)")
    return found


def _possible(moments: Moments, examples: int, spec: Spec) -> bool:
    """Whether some data has these moments: (sum x)^2 <= n * sum x^2 (Cauchy and Schwarz), and bounds."""
    count, total, squares = moments.count, moments.total, moments.squares
    largest = 255.0 if spec.dtype == "uint8" else float(np.finfo(np.float32).max)
    values = examples * prod(spec.shape) // spec.channels  # of one channel or column
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow or NaN fails the comparison
        within = (count >= 0) & (count <= values) & (squares >= 0) & (squares <= count * largest**2)
        return bool((within & (np.square(total) <= count * squares * (1 + 1e-9))).all())


class Said(TypedDict):
    """What a client says with its update; as in `train_reply`."""

    examples: int
    loss: float
    guarded: bool
    steps: NotRequired[int]


def train_reply(
    message: Message,
    arrays: NamedArrays,
    *,
    examples: int,
    loss: float,
    guarded: bool = False,
    steps: int | None = None,
    control: NamedArrays | None = None,
) -> Message:
    """A client's update, whose arrays nobody else uses; QFedAvg needs the loss, so it is always sent.

    Args:
        message: that it answers.
        arrays: state, or gradients.
        examples: its weight.
        loss: mean over the examples seen.
        guarded: the client has protected itself.
        steps: that it made, where the terms ask for them.
        control: change of its control variate, likewise.
    """
    metrics = MetricRecord({EXAMPLES: examples, TRAIN_LOSS: loss})
    if guarded:
        metrics[GUARDED] = 1
    if steps is not None:
        metrics[STEPS] = steps
    content = RecordDict({ARRAYS: to_record(arrays, shared=False), METRICS: metrics})
    if control is not None:
        content[CONTROL] = to_record(control, shared=False)
    return Message(content=content, reply_to=message)


def sum_reply(
    message: Message,
    mean: NamedArrays,
    *,
    examples: int,
    loss: float,
    clients: int,
    steps: int | None = None,
) -> Message:
    """The updates of several clients in one reply: their mean, and the weight that they have together.

    Args:
        message: one that such a client was sent.
        mean: weighted by numbers of examples; becomes part of the reply.
        examples: of all of them.
        loss: the weighted mean of their training losses.
        clients: how many they are.
        steps: that each of them made, where the terms ask for them.
    """
    reply = train_reply(message, mean, examples=examples, loss=loss, steps=steps)
    records_of(reply.content, MetricRecord)[METRICS][CLIENTS] = clients
    return reply


def evaluate_reply(
    message: Message, *, examples: int, loss: float, accuracy: float, held_out: bool = False
) -> Message:
    """A client's evaluation of the global model on its own data, or on what it keeps back of it."""
    metrics = MetricRecord({EXAMPLES: examples, "loss": loss, "accuracy": accuracy})
    if held_out:
        metrics[HELD_OUT] = 1
    return Message(content=RecordDict({METRICS: metrics}), reply_to=message)
