"""Which versions of the global model are worth trying: an architecture, and the form of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from fedge.config import Config, FormName, PruneKind, suggestion
from fedge.errors import ConfigError
from fedge.task import Task
from fedge_server.compression.recovery import Cut

TRAINED: Final[tuple[FormName, ...]] = (
    "w8",
    "w4",
    "ternary",
    "binary",
)  # their weights are trained on a grid
PRECISION: Final[tuple[FormName, ...]] = ("fp32", "int8", *TRAINED)  # from the finest


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network to be had from the global model: itself, itself pruned, or a student."""

    cut: Cut | None = None  # what is pruned
    student: str = ""  # a student of the task, or empty

    @property
    def name(self) -> str:
        """Such as 'prune50', 'sparse90' or 'student-small'; empty for the global model itself."""
        if self.student:
            return f"student-{self.student}"
        if self.cut is None:
            return ""
        return f"{'prune' if self.cut.kind == 'structured' else 'sparse'}{100 * self.cut.share:g}"

    @property
    def learns(self) -> bool:
        """Whether it has to be trained: the global model itself has been."""
        return bool(self.student) or self.cut is not None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A candidate: an architecture, and what its weights are.

    Forms: "fp32"; "int8", integer arithmetic as onnxruntime has it; "w8", "w4", "ternary" and "binary":
    weights of so few values travel packed and compute as float32 again.
    """

    architecture: Architecture
    form: FormName

    @property
    def name(self) -> str:
        """'fp32', 'int8', 'prune50+int8', 'student-small', 'student-small+ternary'."""
        if not self.architecture.name:
            return self.form
        return self.architecture.name + ("" if self.form == "fp32" else f"+{self.form}")

    @property
    def trained(self) -> bool:
        """Whether its weights are trained in their form, beyond the architecture's own training."""
        return self.form in TRAINED


def architectures(task: Task, config: Config) -> tuple[Architecture, ...]:
    """All of a task: the global model, its prunings, the students, and every width of the families.

    Raises:
        ConfigError: `compress.students` names one that the task does not have.
    """
    settings = config.compress.prune
    shares: dict[PruneKind, tuple[float, ...]] = {
        "structured": settings.ratios,
        "unstructured": settings.sparsities,
    }
    cuts = [Cut(kind, share) for kind in settings.kinds for share in sorted(set(shares[kind])) if share]
    ladder = [f"{name}-{width}" for name, family in task.families.items() for width in family.widths]
    students = tuple(dict.fromkeys([*task.students, *ladder]))
    for pattern in config.compress.students:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in students):
            raise ConfigError(
                f"compress.students: {pattern!r} is no student of task {task.name!r}; "
                f"{suggestion(pattern, students)}"
            )
    return (
        Architecture(),
        *(Architecture(cut) for cut in cuts),
        *(
            Architecture(student=name)
            for name in students
            if any(fnmatchcase(name, pattern) for pattern in config.compress.students)
        ),
    )


def recipes(task: Task, config: Config, *, teachable: bool) -> tuple[Recipe, ...]:
    """All candidates of a task, in the order of `architectures` and from the finest numbers.

    A pruned global model is offered as int8 alone: as float32 it is too large, and fewer bits would have to
    be trained at its full size.

    Args:
        task: its students and families.
        config: `compress.forms` and `compress.prune`.
        teachable: whether there are data to train and calibrate with; without, only the unchanged model is
            left.
    """
    if not teachable:
        return (Recipe(Architecture(), "fp32"),)
    forms = tuple(form for form in PRECISION if form in config.compress.forms or form == "fp32")
    return tuple(
        Recipe(architecture, form)
        for architecture in architectures(task, config)
        for form in forms
        if architecture.cut is None or form == "int8"
    )
