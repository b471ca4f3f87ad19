"""Rounds in which clients train a student to answer as the global model does, on data that stays with them.

They are a run's rounds like any other, but for three things: the model is the student, with the weights that
it was given; the strategy's terms hold a lesson; and messages bring the teacher, until a client has kept it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy.typing as npt
from flwr.app import Message, RecordDict
from torch import nn

from fedge.config import Communication, Config, Distil, Model, Rounds, StrategyConfig, Train
from fedge.learning.messages import to_record
from fedge.learning.state import NamedArrays, arrays_of, digest
from fedge.learning.terms import TEACHER, Lesson
from fedge.statistics import Moments

REMEMBERED: Final = "remembered/"  # of the names under which a teacher is kept with the run's state


@dataclass(frozen=True, slots=True)
class Teacher:
    """A global model as clients are sent it."""

    model: str  # its architecture, one of the task's
    arrays: NamedArrays
    digest: str  # SHA-256 of the arrays
    moments: Moments | None  # which standardise its inputs, and those of whom it teaches
    keep: bool  # clients are to keep it
    holders: set[int] = field(default_factory=set)  # clients that have it

    @classmethod
    def of(cls, model: str, network: nn.Module, moments: Moments | None, *, keep: bool) -> Teacher:
        """Of a network.

        Args:
            model: its architecture, one of the task's.
            network: with its weights.
            moments: of the clients' data.
            keep: clients are to keep it: messages bring it once, and anew to one that has lost it.
        """
        arrays = arrays_of(network)
        return cls(model, arrays, digest(arrays), moments, keep)

    def lesson(self, settings: Distil | None = None, *, where_right: bool = False) -> Lesson:
        """What clients are told; without settings they only hold the teacher against others."""
        if settings is None:
            return Lesson(self.model, self.digest, keep=self.keep)
        hard = 0.0 if settings.mode == "soft" else settings.hard_weight
        return Lesson(self.model, self.digest, settings.temperature, hard, self.keep, where_right)

    def sent_with(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with the teacher for those that do not hold it."""
        record, contents = to_record(self.arrays), dict[int, RecordDict]()
        found = list(messages)
        for message in found:
            content = message.content
            if message.metadata.dst_node_id in self.holders:
                continue
            if id(content) not in contents:
                contents[id(content)] = RecordDict({**content, TEACHER: record})
            message.content = contents[id(content)]
        return found

    def noted(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies; whoever answers holds the teacher, and who fails may not."""
        for reply in replies:
            if self.keep:
                change = self.holders.discard if reply.has_error() else self.holders.add
                change(reply.metadata.src_node_id)
            yield reply


@dataclass(frozen=True, slots=True)
class Teaching:
    """A student, and who teaches it."""

    student: nn.Module  # with the weights to start from; of the architecture that the run's model names
    teacher: Teacher
    settings: Distil  # mode, temperature and weight of the labels
    # The teacher is an earlier model of the run's own kind, part of its state, and right or not listened to
    # (`rounds.remembering`).
    lasts: bool = False

    @property
    def lesson(self) -> Lesson | None:
        """What clients are told; None: they learn from their labels alone."""
        if self.settings.mode == "hard" or (self.settings.mode == "both" and self.settings.hard_weight == 1):
            return None
        return self.teacher.lesson(self.settings, where_right=self.lasts)

    def memory(self) -> dict[str, npt.NDArray[Any]]:
        """What must be there after a restart."""
        return {REMEMBERED + name: value for name, value in self.teacher.arrays.items()} if self.lasts else {}


def config_of(config: Config, model: str, settings: Distil, *, robust: bool) -> Config:
    """The configuration of a student's rounds.

    Args:
        config: of the run whose global model teaches.
        model: the student's architecture, such as 'student:small'.
        settings: of the lesson.
        robust: the run's strategy is one that some clients cannot spoil, and is kept; else it is fedavgm
            (Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
            Visual Classification", arXiv:1909.06335): what a student lacks at the end of its rounds is steps.
    """
    clients, rounds = config.compress.clients, config.rounds
    return replace(
        config,
        model=Model(name=model, standardise=config.model.standardise, filter=config.model.filter),
        rounds=Rounds(
            count=clients.rounds,
            fraction=rounds.fraction,
            cohort=rounds.cohort,
            quorum=rounds.quorum,
            min_updates=rounds.min_updates,
            deadline_s=rounds.deadline_s,
        ),
        train=Train(
            epochs=clients.epochs,
            batch_size=clients.batch_size,
            learning_rate=clients.learning_rate,
            schedule="cosine",
            optimizer="adam",
            augment=settings.augment,
        ),
        # A student is small, so its sum may be exact: the same whoever answers first.
        strategy=config.strategy
        if robust
        else StrategyConfig("fedavgm", {"server_momentum": clients.server_momentum, "accumulate": "float64"}),
        communication=Communication(),
        evaluate=replace(config.evaluate, federated=False, folds=None, leave_one_client_out=False),
        tiers={},
    )
