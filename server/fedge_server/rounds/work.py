"""`rounds.local_work = "adaptive"`: how many passes over their data clients make in a round.

AdaComm (Wang and Joshi 2019, "Adaptive Communication Strategies to Achieve the Best Error-Runtime Trade-off
in Local-Update SGD", arXiv:1810.08313) begins with many local steps and makes fewer as the loss F falls:

    tau = ceil(sqrt(F(x) / F(x_0)) tau_0),  and half as many as before where F has not fallen.

Its tau_0 is searched for. Here it is measured, from what theorem 2 there depends on. With D seconds of
travelling in a round and Y seconds for a pass, a round is D + tau Y long, and D / Y passes take as long as
travelling does. And with c the mean cosine between two clients' changes, c / (1 - c) is how much stronger
what they have in common is than what each has for itself, whose root stands for the theorem's deviation of
gradients:

    tau_0 = D / Y sqrt(c / (1 - c)).

The first two rounds make one and two times `train.epochs` passes, to tell D from Y; from then on it is
decided anew every PERIOD rounds, of records alone: so an interrupted run goes on with the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Array, Message

from fedge.config import Config
from fedge.learning.messages import ARRAYS
from fedge.wire.arrays import pieces
from fedge_server.rounds.closing import Admit, Collected
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.validation import Valid

MOST: Final = 20  # passes: beyond, clients go to optima of their own
PERIOD: Final = 5  # rounds between two decisions: the paper's interval T_0
SAMPLE: Final = 2**16  # values of a change by which changes are compared

Values = npt.NDArray[Any]


def most_passes(config: Config) -> int:
    """That clients are ever told to make."""
    epochs = config.train.epochs
    return max(epochs, MOST) if config.rounds.local_work == "adaptive" else epochs


def passes(records: Sequence[RoundRecord], config: Config) -> int:
    """How many each client makes in the next round.

    Args:
        records: of all rounds before, the initial model's first.
        config: of the run.
    """
    epochs = config.train.epochs
    if config.rounds.local_work == "fixed":
        return epochs
    known = [record for record in records if record.counted and record.answer_s is not None]
    made = [record.passes or epochs for record in known]
    if not known:
        return epochs
    if len(set(made)) == 1:
        return 2 * epochs if 2 * epochs <= MOST else max(epochs // 2, 1)
    if (len(known) - 2) % PERIOD:
        return made[-1]
    now = _loss(known)
    if len(known) > PERIOD and now >= _loss(known[:-PERIOD]):
        return max(made[-1] // 2, 1)
    fallen = math.sqrt(min(now / max(_loss(records[:1]), 1e-12), 1.0))
    wanted = _balance(known, made) * _signal(known[-PERIOD:]) * fallen
    return max(math.ceil(min(wanted, MOST) - 1e-9), 1)


def _loss(records: Sequence[RoundRecord]) -> float:
    """The mean of the global model's in the last of these rounds."""
    return statistics.mean(float(record.metrics["loss"]) for record in records[-PERIOD:])  # type: ignore[arg-type]


def _balance(known: Sequence[RoundRecord], made: Sequence[int]) -> float:
    """D / Y: passes that take as long as travelling does.

    Y is the slope of a straight line through all rounds; D is what the last ones took besides.
    """
    seconds = [record.answer_s or 0.0 for record in known]
    y = statistics.linear_regression(made, seconds).slope
    d = statistics.median(s - y * n for s, n in zip(seconds[-PERIOD:], made[-PERIOD:], strict=True))
    return (d / y if y > 0 else math.inf) if d > 0 else 0.0


def _signal(known: Sequence[RoundRecord]) -> float:
    """What clients have in common to what each has for itself, as the ratio of deviations."""
    found = [record.agreement for record in known if record.agreement is not None]
    c = min(max(statistics.median(found), 0.0), 0.99) if found else 0.5
    return math.sqrt(c / (1 - c))


@dataclass(slots=True)
class Look:
    """What a round's valid answers show: when they come, and how far they go the same way.

    Changes are compared by every so many-th of their values, SAMPLE of them, as they come; none is kept.
    """

    origin: Mapping[str, Values]  # what changes are measured from
    now: Callable[[], float]  # seconds, of the clock that clients' work goes by
    began: float = field(init=False)
    seconds: list[float] = field(default_factory=list)  # until each answer
    _directions: Values | None = None  # their sum, each of length 1
    _moved: int = 0  # clients with a direction

    def __post_init__(self) -> None:
        """Clients are asked now."""
        self.began = self.now()

    def around(self, admit: Admit) -> Admit:
        """The same, and each valid answer is looked at."""

        def looked(reply: Message, collected: Collected) -> Valid:
            seconds = self.now() - self.began
            valid = admit(reply, collected)
            self.seconds.append(seconds)
            self._compare(valid.records[ARRAYS])
            return valid

        return looked

    def _compare(self, arrays: Mapping[str, Array]) -> None:
        change = self._sampled(arrays)
        length = float(np.linalg.norm(change))
        if 0 < length < math.inf:
            direction = change / length
            self._directions = direction if self._directions is None else self._directions + direction
            self._moved += 1

    def _sampled(self, arrays: Mapping[str, Array]) -> Values:
        floating = {name: like.reshape(-1) for name, like in self.origin.items() if like.dtype.kind == "f"}
        every = max(sum(flat.size for flat in floating.values()) // SAMPLE, 1)
        found, passed = [], 0
        for name, flat in floating.items():
            for at, piece in pieces(arrays[name]):
                first = -(passed + at) % every
                start = flat[at : at + piece.size][first::every]
                found.append(np.subtract(piece[first::every], start, dtype=np.float64))
            passed += flat.size
        return np.concatenate(found)

    def found(self, made: int) -> dict[str, Any]:
        """What the round's record says, where each client made so many passes."""
        return {"passes": made, "answer_s": self.answer_s, "agreement": self.agreement}

    @property
    def answer_s(self) -> float | None:
        """The median."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def agreement(self) -> float | None:
        """The mean cosine between two clients' changes: of K directions |sum|^2 = K + K (K - 1) c."""
        k = self._moved
        if k < 2 or self._directions is None:
            return None
        return (float(np.dot(self._directions, self._directions)) - k) / (k * (k - 1))
