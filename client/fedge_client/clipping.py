"""Clipping of a client's update before it leaves the device (McMahan et al. 2018, FlatClip).

w_global + min(1, C / ||d||) * d with d = w - w_global, over all arrays together: what Flower's
`fixedclipping_mod` and `adaptiveclipping_mod` compute, whose server-side halves switch it on. Theirs turn
each array into `.npy` bytes and fail for an update of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, MetricRecord

from fedge.errors import FormatError
from fedge.learning import messages
from fedge.learning.state import NamedArrays
from fedge.wire.arrays import records_of

ClientCall = Callable[[Message, Context], Message]
NORM_KEY, KIND_KEY = "clipping_norm", "clipping"  # in a train message's config
NORM_BIT = "norm_bit"  # 1: the update was longer than the norm (Andrew et al. 2021, adaptive clipping)


def clip_when_asked(message: Message, context: Context, call_next: ClientCall) -> Message:
    """A mod that clips where the config of the message says so."""
    config = records_of(message.content, ConfigRecord).get(messages.CONFIG)
    if config is None or NORM_KEY not in config:
        return call_next(message, context)
    norm = config[NORM_KEY]
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 0 < norm < math.inf:
        raise FormatError(f"message: {NORM_KEY} is {norm!r}; it must be a number above 0")
    before = messages.from_record(messages.arrays_named(message.content, messages.ARRAYS))
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    arrays = messages.from_record(messages.arrays_named(reply.content, messages.ARRAYS))
    clipped = clip(arrays, before, float(norm))
    if clipped is not None:
        reply.content[messages.ARRAYS] = messages.to_record(clipped, shared=False)
    if config.get(KIND_KEY) == "adaptive":
        records_of(reply.content, MetricRecord)[messages.METRICS][NORM_BIT] = int(clipped is not None)
    return reply


def clip(arrays: NamedArrays, before: NamedArrays, norm: float) -> NamedArrays | None:
    """The update cut to this length; None where it is no longer than that and stays as it is."""
    changes: dict[str, npt.NDArray[Any]] = {n: np.subtract(value, before[n]) for n, value in arrays.items()}
    length = math.sqrt(sum(_squares(change) for change in changes.values()))
    if length <= norm:
        return None
    factor = norm / length  # NaN where the update holds one, which the server then refuses
    return {name: np.add(before[name], change * factor) for name, change in changes.items()}


def _squares(value: npt.NDArray[Any]) -> float:
    flat = value.reshape(-1)
    return float(np.dot(flat, flat))
