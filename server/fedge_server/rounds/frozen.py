"""The frozen part of the global state on its way down: with each message, or once for clients that keep it.

It is the same in all rounds. Where a run asks for it (`communication.keep_frozen`), a client that trains
keeps it and says so with its update; from then on it is sent the checksum alone. One that does not hold it
any longer answers with an error and is sent it the next time; one of an older release never says that it
holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MetricRecord, RecordDict

from fedge.codecs.update import checksum
from fedge.config import Config
from fedge.learning.messages import HOLDS_FROZEN, METRICS, NamedArrays, to_record
from fedge.learning.terms import FROZEN, Terms
from fedge.wire.arrays import records_of
from fedge_server.rounds.closing import Admit, Collected
from fedge_server.rounds.validation import UnfitError, Valid

HOLDERS: Final = "frozen-holders"  # name of what is remembered


@dataclass(slots=True)
class Frozen:
    """What does not come back of the global state, and who holds it."""

    arrays: NamedArrays
    checksum: int | None  # that clients are told, where they are to keep the arrays
    holders: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, terms: Terms, arrays: NamedArrays, config: Config) -> Frozen | None:
        """None where nothing is frozen."""
        own = {name: arrays[name] for name in terms.frozen}
        return cls(own, checksum(own) if config.communication.keep_frozen else None) if own else None

    @property
    def keep(self) -> bool:
        """Whether clients are asked to keep them."""
        return self.checksum is not None

    def dressed(self, messages: Iterable[Message]) -> list[Message]:
        """The same messages, with the frozen arrays for those that do not hold them."""
        found, frozen = list(messages), to_record(self.arrays)
        contents: dict[
            int, tuple[RecordDict, RecordDict]
        ] = {}  # by identity: one content goes to many clients
        for message in found:
            if message.metadata.dst_node_id in self.holders:
                continue
            content = message.content
            if id(content) not in contents:
                contents[id(content)] = content, RecordDict({**content, FROZEN: frozen})
            message.content = contents[id(content)][1]
        return found

    def around(self, admit: Admit) -> Admit:
        """The same; it is noted who holds the arrays, and who may not."""
        if not self.keep:
            return admit

        def noted(reply: Message, collected: Collected) -> Valid:
            client, holds = reply.metadata.src_node_id, _says_that_it_holds(reply)
            try:
                valid = admit(reply, collected)
            except UnfitError:
                self.holders.discard(client)
                raise
            self.holders |= {client} if holds else set()
            return valid

        return noted

    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """What must be there after a restart."""
        return {HOLDERS: np.array(sorted(self.holders), np.uint64)}

    def remembering(self, memory: Mapping[str, npt.NDArray[Any]]) -> Frozen:
        """The same, with what `memory` gave."""
        found = memory[HOLDERS].tolist() if HOLDERS in memory else []
        return Frozen(self.arrays, self.checksum, {int(node) for node in found})


def _says_that_it_holds(reply: Message) -> bool:
    """Take that out of the reply: nothing but what every update holds is left to be looked at."""
    metrics = None if reply.has_error() else records_of(reply.content, MetricRecord).get(METRICS)
    return metrics is not None and metrics.pop(HOLDS_FROZEN, None) == 1
