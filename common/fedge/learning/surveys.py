"""The typed view of what a server asks of clients' data once a model is trained; never an example comes back.

| message type | server sends | client replies |
|---|---|---|
| query.ranges | config, survey, arrays `graph` | arrays `ranges`: lowest, highest |
| query.counts | config, survey, arrays `variant` and a lesson's `teacher` | arrays `counts`; metrics |

What comes back is as large as the tensors or the classes are many, however many examples there are. A
client that has fewer than it is told, or than `LEAST`, answers with an error: few could be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.counts import NAMES, Counts
from fedge.errors import FormatError
from fedge.holdout import Part
from fedge.learning.messages import CONFIG, METRICS, Instructions, arrays_named, from_record, to_record
from fedge.ranges import Ranges
from fedge.wire.arrays import records_of

QUERY_RANGES: Final = "query.ranges"
QUERY_COUNTS: Final = "query.counts"
GRAPH, VARIANT, SURVEY = "graph", "variant", "survey"  # records of what is sent
RANGES, COUNTS, UNUSABLE = "ranges", "counts", "unusable"  # and of what comes back
LEAST: Final = 4  # examples that a client lets itself be asked about, whatever the server says
MAX_CALIBRATED: Final = 256  # of a client's examples whose ranges it tells
MAX_INSTALLED_BYTES: Final = 2**29  # of a variant that a client opens
_BYTES: Final = "bytes"  # the one array of a graph or a variant


@dataclass(frozen=True, slots=True)
class Survey:
    """On which of its examples a client looks.

    Raises:
        ValueError: a number is out of range.
    """

    least: int  # fewer than these, and it does not answer
    most: int  # more than these are not looked at
    part: Part = "gate"  # of what it keeps back; not looked at for ranges
    selection: float = 0.5  # share of what it keeps back that is for selection
    installed_bytes: int = 0  # of the variant

    def __post_init__(self) -> None:
        """Refuse nonsense."""
        if not 1 <= self.least <= self.most:
            raise ValueError(f"survey: least {self.least}, most {self.most}")
        if self.part not in get_args(Part) or not 0 < self.selection < 1:
            raise ValueError(f"survey: part {self.part!r}, selection {self.selection}")
        if not 0 <= self.installed_bytes <= MAX_INSTALLED_BYTES:
            raise ValueError(f"survey: {self.installed_bytes} bytes are over {MAX_INSTALLED_BYTES}")

    @classmethod
    def of(cls, message: Message) -> Survey:
        """Read what came over a network.

        Raises:
            FormatError: it is no survey.
        """
        try:
            record = records_of(message.content, ConfigRecord)[SURVEY]
            numbers = [record[key] for key in ("least", "most", "installed-bytes")]
            share = record["selection"]
            if not all(type(number) is int for number in numbers) or not isinstance(share, float):
                raise ValueError("numbers of another type")
            least, most, installed = numbers
            return cls(least, most, record["part"], share, installed)  # type: ignore[arg-type]  # checked
        except (KeyError, ValueError) as error:
            raise FormatError(f"message: survey is malformed ({type(error).__name__}: {error})") from error

    def record(self) -> ConfigRecord:
        """As it travels."""
        return ConfigRecord(
            {
                "least": self.least,
                "most": self.most,
                "part": self.part,
                "selection": self.selection,
                "installed-bytes": self.installed_bytes,
            }
        )


def asking(instructions: Instructions, survey: Survey, name: str, data: bytes) -> RecordDict:
    """What clients are sent: a graph or a variant to run on their own examples."""
    arrays = to_record({_BYTES: np.frombuffer(data, np.uint8)})
    return RecordDict({CONFIG: instructions.to_config(), SURVEY: survey.record(), name: arrays})


def sent_bytes(message: Message, name: str) -> bytes:
    """The graph or the variant that a message brought.

    Raises:
        FormatError: it brought none.
    """
    found = from_record(arrays_named(message.content, name))
    if list(found) != [_BYTES] or found[_BYTES].dtype != np.uint8 or found[_BYTES].ndim != 1:
        raise FormatError(f"message: {name} is not one array of bytes")
    return found[_BYTES].tobytes()


def ranges_reply(message: Message, ranges: Ranges) -> Message:
    """A client's answer to query.ranges."""
    arrays = to_record({"lowest": ranges.lowest, "highest": ranges.highest})
    return Message(content=RecordDict({RANGES: arrays}), reply_to=message)


def counts_reply(message: Message, counts: Counts, unusable: int) -> Message:
    """A client's answer to query.counts.

    Args:
        message: that asked.
        counts: of the examples.
        unusable: to how many of them the variant gave no numbers.
    """
    arrays = to_record({name: getattr(counts, name) for name in NAMES})
    return Message(
        content=RecordDict({COUNTS: arrays, METRICS: MetricRecord({UNUSABLE: unusable})}), reply_to=message
    )


def ranges_like(tensors: int) -> dict[str, npt.NDArray[np.generic]]:
    """Names, shapes and dtypes of an answer's arrays, for so many tensors."""
    return {name: np.zeros(tensors, np.float32) for name in ("lowest", "highest")}


def counts_like(classes: int) -> dict[str, npt.NDArray[np.generic]]:
    """The same of counts."""
    return {name: np.zeros(classes, np.int64) for name in NAMES}
