"""A task says what is learned: how to read data, which models, and what a device's answer is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedge.config import FilterName, suggestion
from fedge.dataset import Dataset
from fedge.errors import ConfigError
from fedge.spec import Spec
from fedge.statistics import Moments

STUDENT: Final = "student:"  # begins the name of a model that is one of the task's students

if TYPE_CHECKING:  # a task can be named and described without torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Source:
    """Where a user's data lies and how to read it: the configuration's `data*` keys."""

    path: Path | None = None  # file or folder; None: the task brings its own
    label: str = "y"  # tables: the column that holds the label
    client: str | None = None  # tables: the column that holds the natural client
    size: tuple[int, int] | None = None  # image folders: resize to (height, width)
    labels: tuple[str, ...] = ()  # on a device: the run's classes, of which it may hold only some


_MAX_WIDTH = 4096  # of a student that is named by its width

Reader = Callable[[Source], Dataset]
"""Read a source into memory; raises DataError when it cannot be used."""

ModelBuilder = Callable[[Spec], "nn.Module"]
"""A freshly initialised network: pre-processed input to logits (B, classes).

It gets float32 images (B, C, H, W), features (B, F) or signals (B, C, T), or int64 codes (B, T) of text.
"""

PreprocessBuilder = Callable[[Spec, Moments | None, FilterName], "nn.Module"]
"""The module from raw input (B, *spec.shape) to what the network takes; it is exported with the network.
`Moments` are the federated ones, or None when the configuration switches standardisation off."""


def _standard_preprocess(spec: Spec, moments: Moments | None, noise_filter: FilterName) -> nn.Module:
    from fedge.learning.preprocess import build

    return build(spec, moments, noise_filter)


@dataclass(frozen=True, slots=True)
class Family:
    """Students of one kind in several widths: the search takes those that fit a device's budgets."""

    of: Callable[[int], ModelBuilder]  # the builder of the student of this width
    widths: tuple[int, ...]  # that are worth trying, ascending

    def __post_init__(self) -> None:
        """Refuse what is no ascending row of widths."""
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or self.widths[0] < 1:
            raise ConfigError(f"family: widths {self.widths}: must be whole numbers above 0, ascending")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned. Write one in a module of your own and name it `package.module:TASK`."""

    name: str
    read: Reader
    models: Mapping[str, ModelBuilder]  # architectures of the global model
    default_model: str  # a key of models
    students: Mapping[str, ModelBuilder]  # smaller architectures to distil into; may be empty
    families: Mapping[str, Family] = field(default_factory=dict)  # students of any width, by name
    preprocess: PreprocessBuilder = _standard_preprocess

    def __post_init__(self) -> None:
        """Refuse a default that does not exist."""
        if self.default_model not in self.models:
            raise ConfigError(
                f"task {self.name!r}: default_model {self.default_model!r} is not among its models: "
                f"{', '.join(self.models) or 'none'}"
            )

    def model(self, name: str) -> ModelBuilder:
        """The builder of a named model; an empty name means the default, 'student:NAME' a student.

        Raises:
            ConfigError: the task has no such model; the line names the nearest one.
        """
        chosen = name or self.default_model
        if chosen.startswith(STUDENT):
            return self.student(chosen.removeprefix(STUDENT))
        if chosen not in self.models:
            raise ConfigError(
                f"model.name = {name!r}: task {self.name!r} has no such model; "
                f"{suggestion(name, list(self.models))}"
            )
        return self.models[chosen]

    def student(self, name: str) -> ModelBuilder:
        """The builder of a student: one of `students`, or FAMILY-WIDTH of one of `families`.

        Raises:
            ConfigError: the task has no such student; the line names the nearest one.
        """
        if name in self.students:
            return self.students[name]
        family, _, width = name.rpartition("-")
        if family in self.families and width.isdecimal() and 1 <= int(width) <= _MAX_WIDTH:
            return self.families[family].of(int(width))
        known = [*self.students, *(f"{name}-{w}" for name, of in self.families.items() for w in of.widths)]
        raise ConfigError(
            f"model.name = {STUDENT + name!r}: task {self.name!r} has no such student; "
            f"{suggestion(name, known) if known else 'it has none'}"
        )


def resolve(name: str) -> Task:
    """The built-in task of this name, or the one that `package.module:TASK` points to.

    The current folder is searched too, as `python -m` does, so that a module beside the configuration
    works without being installed.

    Raises:
        ConfigError: no such built-in task, module or attribute, the module fails, or it is not a Task.
    """
    from fedge.tasks import BUILT_IN

    if ":" not in name:
        if name not in BUILT_IN:
            hint = suggestion(name, list(BUILT_IN))
            raise ConfigError(f"task = {name!r}: no built-in task; {hint}, or name yours package.module:TASK")
        module_name, attribute = BUILT_IN[name], "TASK"
    else:
        module_name, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's own module may raise anything, a SyntaxError too
        detail = str(error).splitlines()[0] if str(error) else "no message"
        raise ConfigError(f"task = {name!r}: cannot be loaded ({type(error).__name__}: {detail})") from error
    if not isinstance(found, Task):
        raise ConfigError(f"task = {name!r}: is a {type(found).__name__}, not a fedge.Task")
    return found
