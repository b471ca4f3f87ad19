"""What a strategy asks of its clients beyond plain training: declared once, told them, held against replies.

| term | for | a client gets besides | sends besides | keeps on the device |
|---|---|---|---|---|
| steps | FedNova | | metric: `steps` | |
| control | SCAFFOLD | arrays `control` | arrays `control` | its control variate |
| own | FedBN, FedPer | | | entries of the model's state, which do not travel |
| frozen | `train.freeze`, any strategy | arrays `frozen`: these entries | nothing of them | |
| pull | Ditto | | | a whole personal model |
| lesson | distillation on clients | arrays `teacher`: a model's state, once | | that state |

What travels besides is as large as the model's parameters, with their names (a teacher's state: as its own
model's); what is kept lies in `Context.state`, which never leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.config import Train

STEPS: Final = "steps"  # metric of a reply: optimiser steps that the client has made
CONTROL: Final = "control"  # record of arrays: the server's control variate, or the change of a client's
FROZEN: Final = "frozen"  # record of arrays: entries that are sent, not trained, and not sent back
TEACHER: Final = "teacher"  # record of arrays: the state of the network whose answers are learned
VOID: Final = "control-void"  # key of the config: what this client sent from that round on was not counted

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Lesson:
    """From whose answers clients train a model, and how (`fedge.learning.lessons`)."""

    model: str  # the teacher's architecture, one of the task's
    digest: str  # SHA-256 of its state (`fedge.learning.state.digest`)
    temperature: float = 2.0  # by which both networks' logits are divided
    hard_weight: float = 0.0  # of the client's labels in the loss; the rest is the teacher's
    keep: bool = True  # the client keeps the teacher: it is not sent again
    where_right: bool = False  # an example that the teacher answers wrongly is learned from its label alone

    def __post_init__(self) -> None:
        """Refuse a lesson in which nothing is learned from the teacher."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"lesson: temperature {self.temperature} must be above 0")
        if not 0 <= self.hard_weight < 1:
            raise ValueError(f"lesson: hard weight {self.hard_weight} must be from 0 to below 1")

    def said(self) -> dict[str, bool | float | str | list[str]]:
        """The keys of a config."""
        found: dict[str, bool | float | str | list[str]] = {
            "lesson-model": self.model,
            "lesson-digest": self.digest,
            "lesson-temperature": self.temperature,
            "lesson-hard-weight": self.hard_weight,
            "lesson-keep": self.keep,
        }
        return found | ({"lesson-where-right": True} if self.where_right else {})

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Lesson | None:
        """Read the keys that `said` gives, from a config that came over a network; None: there are none.

        Raises:
            ValueError: a value of another type, or out of range.
        """
        if "lesson-model" not in config:
            return None
        model, digest = config["lesson-model"], config.get("lesson-digest")
        if not isinstance(model, str) or not isinstance(digest, str):
            raise ValueError("lesson: model and digest must be text")
        temperature, weight = (_number(config, f"lesson-{key}") for key in ("temperature", "hard-weight"))
        keep, right = (config.get(f"lesson-{key}") is True for key in ("keep", "where-right"))
        return cls(model, digest, temperature, weight, keep, right)


@dataclass(frozen=True, slots=True)
class Terms:
    """What clients do, send and keep for a strategy."""

    steps: bool = False  # they tell how many optimiser steps they made
    control: bool = False  # their steps are corrected by control variates, whose changes they send
    own: tuple[str, ...] = ()  # entries of the model's state that stay on the device
    frozen: tuple[str, ...] = ()  # entries of the model's state that are not trained, and not sent back
    pull: float = 0.0  # weight of a personal model's pull towards the global one; 0: there is no such model
    lesson: Lesson | None = None  # they learn a teacher's answers too

    def __post_init__(self) -> None:
        """Refuse a pull that is none."""
        if not (math.isfinite(self.pull) and self.pull >= 0):
            raise ValueError(f"pull {self.pull} must be a number from 0")

    @property
    def keeps(self) -> bool:
        """Whether a client has something to remember: its app must run, whoever does the training."""
        return self.control or bool(self.own) or self.pull > 0

    def said(self) -> dict[str, bool | float | str | list[str]]:
        """The keys of a config for what is asked for, none for what is not: older devices read the rest."""
        names = {"terms-own": list(self.own), "terms-frozen": list(self.frozen)}
        found: dict[str, bool | float | str | list[str]] = {
            key: value for key, value in names.items() if value
        }
        if self.lesson is not None:
            found |= self.lesson.said()
        for key, value in (("steps", self.steps), ("control", self.control), ("pull", self.pull)):
            if value:
                found[f"terms-{key}"] = value
        return found

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Terms:
        """Read the keys that `said` gives, from a config that came over a network.

        Raises:
            ValueError: a value of another type, or out of range.
        """
        pull = _number(config, "terms-pull", 0.0)
        steps, control = (config.get(f"terms-{key}") is True for key in ("steps", "control"))
        own, frozen = (_names(config, f"terms-{key}") for key in ("own", "frozen"))
        return cls(steps, control, own, frozen, pull, Lesson.of(config))

    def shared(self, state: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """The part of a model's state that clients send, and strategies aggregate."""
        other = frozenset((*self.own, *self.frozen))
        return {name: value for name, value in state.items() if name not in other}


def _number(config: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} is a {type(value).__name__}, not a number")
    return float(value)


def _names(config: Mapping[str, object], key: str) -> tuple[str, ...]:
    found = config.get(key, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{key} is no list of names")
    return tuple(found)


PLAIN: Final = Terms()


@dataclass(frozen=True, slots=True)
class Beside:
    """What a reply must hold besides state, examples and loss."""

    metrics: Mapping[str, int] = field(default_factory=dict)  # whole numbers from 1: the largest of each
    arrays: Mapping[str, Arrays] = field(default_factory=dict)  # records, each like these
    like: Callable[[int], Arrays] | None = None  # a client's own model, where architectures differ

    @classmethod
    def of(
        cls,
        terms: Terms,
        parameters: Arrays,
        most_steps: int,
        like: Callable[[int], Arrays] | None = None,
    ) -> Beside:
        """What a strategy's terms ask for.

        Args:
            terms: of the strategy.
            parameters: the trainable entries of the global state.
            most_steps: that a client can make.
            like: the state of a client's model, by node id; None: all have the global one.
        """
        metrics = {STEPS: most_steps} if terms.steps else {}
        return cls(metrics, {CONTROL: parameters} if terms.control else {}, like)


def accumulated(steps: int, settings: Train) -> float:
    """How many gradients' worth of way so many steps of SGD go: the norm |a|_1 of FedNova.

    Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
    section 4: with momentum rho, gradient j of tau counts (1 - rho^(tau - j)) / (1 - rho) times in what the
    weights have moved, in all [tau - rho (1 - rho^tau) / (1 - rho)] / (1 - rho); without, tau.

    Args:
        steps: tau, at least 1.
        settings: the run's `[train]`; its optimiser is SGD.
    """
    rho = settings.momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
