"""Updates in a codec, turned back into arrays before anything else looks at them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, Message

from fedge.codecs.chain import Codec
from fedge.codecs.layout import Layout
from fedge.codecs.stages import key_of
from fedge.codecs.update import decode, most_bytes
from fedge.errors import FormatError
from fedge.learning.messages import ARRAYS, CODED, to_record
from fedge.wire.arrays import put, raw_bytes
from fedge_server.rounds.validation import declared_fault


@dataclass(frozen=True, slots=True)
class Decoder:
    """What clients of a round were asked to send, and what it is measured from."""

    codec: Codec
    layout: Layout
    seed: int
    round: int
    coded: set[int] = field(default_factory=set)  # clients whose update came in the codec

    def __call__(self, reply: Message) -> None:
        """Put the arrays that an update stands for into its message.

        One that came whole stays as it is: devices of an older release do not know codecs.

        Raises:
            FormatError: it is no update in this codec.
        """
        record = reply.content[ARRAYS]
        if not isinstance(record, ArrayRecord) or list(record) != [CODED]:
            return
        array, most = record[CODED], most_bytes(self.layout, self.codec)
        shape = tuple(array.shape)
        if len(shape) != 1 or shape[0] > most:  # before anything is read
            raise FormatError(f"codec: an array of shape {shape}; it must be one of {most} bytes at most")
        if (wrong := declared_fault(array, np.broadcast_to(np.uint8(0), shape))) is not None:
            raise FormatError(f"codec: array {CODED!r} {wrong}")
        data = bytes(raw_bytes(array.numpy()))
        if len(data) != shape[0]:
            raise FormatError(f"codec: {len(data)} bytes instead of {shape[0]}")
        key = key_of(self.seed, self.round, reply.metadata.src_node_id)
        arrays = decode(data, self.layout, self.codec, key=key)
        put(reply.content, {ARRAYS: to_record(arrays, shared=False)})
        self.coded.add(reply.metadata.src_node_id)
