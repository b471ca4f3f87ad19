"""Who does clients' jobs in a simulation, and how a client's app hands its job over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import greenlet

from fedge.dataset import Indices
from fedge.learning import local
from fedge.learning.local import Job, Trained
from fedge.learning.state import NamedArrays


@dataclass(frozen=True, slots=True)
class Client:
    """What tells a client apart from the others in a sum."""

    node_id: int
    indices: Indices  # of its examples in the data set
    seed: int  # as in `Job`


@dataclass(frozen=True, slots=True)
class Sum:
    """What the jobs of several clients gave together."""

    mean: NamedArrays  # weighted by examples, in the dtypes of the state
    examples: int  # of all that are in it
    loss: float  # weighted mean of their training losses
    clients: int  # that are in it
    failed: Mapping[int, str]  # by node id: why a client is not in it


class Trainers(Protocol):
    """Does jobs."""

    can_sum: bool  # whether `sum` is there to be used

    def train(self, jobs: Sequence[Job]) -> Sequence[Trained | Exception]:
        """The results in order; a job that failed gives its error and spoils no other."""
        ...

    def at_once(self, job: Job) -> int:
        """How many jobs like this are worth being done together, at least 1."""
        ...

    def sum(self, job: Job, clients: Sequence[Client]) -> Sum:
        """The weighted mean of many clients' results, none of which is kept.

        Args:
            job: what they have in common; its examples and seed are not used.
            clients: one at least.
        """
        ...

    def close(self) -> None:
        """Give back what was taken for it, such as processes."""
        ...


class OneByOne:
    """Does one job after the other, by the device's own code."""

    can_sum = False

    def train(self, jobs: Sequence[Job]) -> Sequence[Trained | Exception]:
        """The results in order."""
        return [attempt(job) for job in jobs]

    def at_once(self, job: Job) -> int:
        """One: nothing is gained by waiting for a second."""
        return 1

    def sum(self, job: Job, clients: Sequence[Client]) -> Sum:
        """Never asked for, since `can_sum` says so."""
        raise NotImplementedError

    def close(self) -> None:
        """There is nothing to give back."""


def attempt(job: Job) -> Trained | Exception:
    """A job done as a device does it: its result, or what it raised."""
    try:
        return local.fit(job)
    except Exception as error:  # noqa: BLE001 - a client's failure is its result, whatever it was
        return error


class Turn(greenlet):  # type: ignore[misc]  # greenlet has no annotations
    """A client's app at work, which stands still while its job is done together with others'."""


def hand_over(job: Job) -> Trained:
    """A client app's trainer in a simulation: give the job away, and go on when its result is there.

    Raises:
        Exception: what the job raised.
    """
    turn = greenlet.getcurrent()
    if not isinstance(turn, Turn) or turn.parent is None:
        return local.fit(job)
    result: Any = turn.parent.switch(job)
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Trained)  # noqa: S101 - narrows the type; the Grid gives nothing else
    return result
