"""The global state's way down as changes: clients that hold the last state are sent what is new of it.

The state that clients hold and the server's are the same to the bit: after each round the new global state is
replaced by what a client makes of the change, and what the codec leaves out is kept for the next one
(error feedback on the server, as in DoubleSqueeze, Tang et al. 2019). Whoever has not answered in the codec
in the last round is sent the whole state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.codecs.chain import Codec
from fedge.codecs.layout import Change, Layout
from fedge.codecs.stages import key_of
from fedge.codecs.update import checksum, decode, encode
from fedge.learning.messages import ARRAYS, CODED, CONFIG, change_values, to_record
from fedge.learning.state import NamedArrays
from fedge.wire.arrays import records_of


@dataclass(frozen=True, slots=True)
class Downlink:
    """What the last round changed of the state that travels, and who can make use of that."""

    codec: Codec
    parameters: frozenset[str]  # names of what is trained
    seed: int
    base: int = 0  # checksum of the state that clients of the last round hold
    state: int = 0  # and of the one that the change makes of it
    data: bytes = b""  # the change
    residual: Change | None = None  # what it leaves out
    holders: frozenset[int] = frozenset()  # clients that hold the base

    def settled(self, before: NamedArrays, after: NamedArrays) -> tuple[Self, NamedArrays]:
        """The change from one state to the next, and the next as clients will have it.

        Args:
            before: what travelled in this round.
            after: what the strategy has made of it; what does not travel is left as it is.
        """
        layout, base = Layout.of(before, self.parameters), checksum(before)
        key = key_of(self.seed, base, 0)
        coded = encode(
            {name: after[name] for name in before}, layout, self.codec, key=key, residual=self.residual
        )
        found = decode(coded.data, layout, self.codec, key=key)
        made = replace(
            self,
            base=base,
            state=checksum(found),
            data=coded.data,
            residual=coded.residual,
        )
        return made, {**after, **found}

    def stayed(self, state: NamedArrays) -> Self:
        """After a round that did not count."""
        same = checksum(state)
        return replace(self, base=same, state=same, data=b"")

    def held_by(self, clients: Collection[int]) -> Self:
        """After these clients have answered what was sent to them in the last round."""
        return replace(self, holders=frozenset(clients))

    def dressed(self, messages: Iterable[Message], whole_bytes: int) -> list[Message]:
        """The round's messages, with the change instead of the state for those that hold what it is from.

        Args:
            messages: as the strategy made them, with the whole state.
            whole_bytes: of that.
        """
        contents: dict[int, RecordDict] = {}  # by identity: one content goes to many clients
        found = list(messages)
        for message in found:
            if message.metadata.dst_node_id not in self.holders:
                continue
            content = message.content
            if id(content) not in contents:
                told: dict[str, Any] = dict(records_of(content, ConfigRecord)[CONFIG])
                config = ConfigRecord({**told, **change_values((self.base, self.state), whole_bytes)})
                contents[id(content)] = RecordDict(
                    {
                        **content,
                        ARRAYS: to_record({CODED: np.frombuffer(self.data, np.uint8)}),
                        CONFIG: config,
                    }
                )
            message.content = contents[id(content)]
        return found

    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """What a resumed run needs."""
        residual = {} if self.residual is None else {"residual": self.residual}
        return {
            **residual,
            "data": np.frombuffer(self.data, np.uint8),
            "sums": np.array([self.base, self.state], np.int64),
            "holders": np.array(sorted(self.holders), np.uint64),
        }

    def remembering(self, memory: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The same with what `memory` gave when the last round was committed."""
        base, state = (int(value) for value in memory["sums"])
        holders = frozenset(int(value) for value in memory["holders"])
        return replace(
            self,
            base=base,
            state=state,
            data=memory["data"].tobytes(),
            residual=memory.get("residual"),
            holders=holders,
        )
