"""A small network learns the answers of a large one (Hinton, Vinyals, Dean 2015).

"Distilling the Knowledge in a Neural Network", arXiv:1503.02531: the student is trained on the teacher's
probabilities, softened by a temperature T, and where wanted on the true labels as well, and on hints of the
teacher's hidden layer (`teachers`). All networks take the same pre-processed inputs, so teacher and student
share one pre-processing.

Shapes: N examples, B batch, C classes.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedge.config import Distil
from fedge.errors import CompressionError, ConfigError, TimeUpError
from fedge.learning import draws
from fedge.learning.augment import augment
from fedge.learning.lessons import softened
from fedge.learning.threads import fitted
from fedge_server.compression.precision import Numbers, numbers_for
from fedge_server.compression.teachers import Hints, Teachers

Teacher = nn.Module | Sequence[nn.Module] | Tensor
"""A network, several whose softened probabilities are averaged, or answers (N, C) that somebody else made."""

Tell = Callable[[int, int, float], None]
"""Told after each epoch: how many are done, of how many, and the mean loss of the last one."""

_CHUNK = 256  # examples that go through a network at once where nothing is learned


def distil(
    teacher: Teacher,
    student: nn.Module,
    x: Tensor,
    y: Tensor | None,
    settings: Distil,
    *,
    seed: int,
    keep_zeros: bool = False,
    tell: Tell | None = None,
    deadline: float | None = None,
) -> nn.Module:
    """A copy of the student, trained to answer as the teacher does; no argument is changed.

    With augmentation the teacher sees the same altered batch as the student ("consistent teaching", Beyer
    et al. 2022); without, it answers once. A training that is cut short is worth nothing, since its learning
    rate is still high, so there is no half result: past its deadline it raises.

    Args:
        teacher: from pre-processed inputs to logits (B, C). Answers to x go without augmentation or hints.
        student: network of the same interface; its weights are the starting point.
        x: pre-processed inputs (N, ...), float32.
        y: true classes (N,), int64; None: not known, which mode "soft" can do with.
        settings: mode, temperature, epochs and the like.
        seed: decides the order of the examples, augmentation, dropout and the regressor of the hints.
        keep_zeros: weights that are exactly 0 stay so: a network pruned weight by weight (`sparsify`).
        tell: told of each epoch.
        deadline: a value of `time.monotonic` after which no further step begins; None: none.

    Raises:
        CompressionError: fewer than two examples, no labels where the mode needs them, no networks where
            hints do, or the loss ceased to be finite.
        TimeUpError: the deadline has passed.
        ConfigError: an augmentation does not fit the inputs.
    """
    _check(teacher, x, y, settings)
    numbers = numbers_for(settings.precision, student, settings.batch_size)
    student = numbers.laid_out(copy.deepcopy(student)).train()
    batches = -(-len(x) // settings.batch_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lesson = _Lesson.of(teacher, student, x, y, settings, numbers)
        step = _Stepper(student, lesson, settings, batches * settings.epochs, keep_zeros=keep_zeros)
        with closing(lesson), fitted(student, settings.batch_size):
            for epoch in range(1, settings.epochs + 1):
                losses = []
                # Parts of nearly equal size: a last batch of one example would break batch normalisation.
                for chosen in torch.randperm(len(x), generator=generator).tensor_split(batches):
                    _check_time(deadline, epoch, settings.epochs)
                    losses.append(step(chosen, draws.keys_from(generator, len(chosen))))
                _check_loss(float(torch.stack(losses).mean()), epoch, settings, tell)
    return student.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload, no-any-return]


def check_augment(x: Tensor, names: tuple[str, ...]) -> None:
    """Try the augmentations on pre-processed inputs (B, ...).

    Raises:
        ConfigError: one of them does not fit these inputs.
    """
    try:
        augment(x, names, torch.arange(len(x)))
    except ValueError as error:
        raise ConfigError(f"compress.distil.augment: {error}") from error


@torch.no_grad()
def logits(network: nn.Module, x: Tensor) -> Tensor:
    """A network's answers (N, C) to pre-processed inputs (N, ...); it must be in evaluation mode."""
    return torch.cat([network(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)])


@torch.no_grad()
def preprocessed(preprocess: nn.Module, raw: npt.NDArray[Any]) -> Tensor:
    """Raw inputs (N, *spec.shape) as a network takes them."""
    return torch.cat([preprocess(torch.from_numpy(raw[i : i + _CHUNK])) for i in range(0, len(raw), _CHUNK)])


@dataclass(slots=True)
class _Lesson:
    """What the student is to say to each batch, and how far it is off."""

    x: Tensor
    y: Tensor | None
    settings: Distil
    numbers: Numbers  # of the student
    teachers: Teachers | None  # None: they have said all that is needed
    known: Tensor | None  # answers (N, C) to x
    hidden: Tensor | None  # hidden values (N, G)
    hints: Hints | None

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        student: nn.Module,
        x: Tensor,
        y: Tensor | None,
        settings: Distil,
        numbers: Numbers,
    ) -> _Lesson:
        """Ask the teachers once, where their answers will stay the same."""
        lesson = cls(x, y, settings, numbers, None, None, None, None)
        if isinstance(teacher, Tensor):
            lesson.known = None if settings.mode == "hard" else teacher
            return lesson
        hinted = settings.hint_weight > 0
        if settings.mode == "hard" and not hinted:
            return lesson
        networks = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        precision = settings.precision if settings.augment else "fp32"  # what is asked once is asked exactly
        answering = numbers_for(precision, networks[0], settings.batch_size)
        made = Teachers(networks, settings.temperature, answering, example=x[:2], taps=hinted)
        lesson.hints = Hints(student, made, x) if hinted else None
        if settings.augment:
            lesson.teachers = made
        else:
            lesson.known, lesson.hidden = made.teach_all(x)
        return lesson

    def loss(self, student: nn.Module, chosen: Tensor, keys: Tensor) -> Tensor:
        """Of one batch; `keys` decide its augmentation."""
        inputs = augment(self.x[chosen], self.settings.augment, keys)
        targets = None if self.known is None else self.known[chosen]
        hidden = None if self.hidden is None else self.hidden[chosen]
        if self.teachers is not None:
            targets, hidden = self.teachers.teach(inputs)
        with self.numbers.used():
            answers = student(self.numbers.laid_out(inputs)).float()
        y = None if self.y is None else self.y[chosen]
        loss = _loss(answers, None if self.settings.mode == "hard" else targets, y, self.settings)
        if self.hints is not None and hidden is not None:
            loss = loss + self.settings.hint_weight * self.hints.loss(hidden)
        return loss

    def close(self) -> None:
        """Leave the student as a network of its own."""
        if self.hints is not None:
            self.hints.close()


class _Stepper:
    """One step of Adam along one cycle of the learning rate; zeros stay where they are to."""

    def __init__(
        self, student: nn.Module, lesson: _Lesson, settings: Distil, steps: int, *, keep_zeros: bool
    ) -> None:
        regressor = [] if lesson.hints is None else [lesson.hints.regressor]
        parameters = [*itertools.chain(*(module.parameters() for module in (student, *regressor)))]
        self._student, self._lesson = student, lesson
        self._optimizer = torch.optim.Adam(parameters, settings.learning_rate, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, settings.learning_rate, total_steps=steps
        )
        self._masks = [
            (p, p.detach() != 0)
            for p in student.parameters()
            if keep_zeros and p.dim() > 1 and (p == 0).any()
        ]

    def __call__(self, chosen: Tensor, keys: Tensor) -> Tensor:
        """The loss of this batch before the step."""
        loss = self._lesson.loss(self._student, chosen, keys)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, mask in self._masks:  # Adam leaves alone what has never had a gradient
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()


def _check(teacher: Teacher, x: Tensor, y: Tensor | None, settings: Distil) -> None:
    if len(x) < 2:
        raise CompressionError(f"distil: {len(x)} examples are too few to learn from; bring more proxy data")
    if y is None and settings.mode != "soft":
        raise CompressionError(
            f"distil: there are no labels, which compress.distil.mode = {settings.mode!r} needs; "
            "set mode = 'soft'"
        )
    if isinstance(teacher, Tensor) and settings.hint_weight:
        raise CompressionError(
            "distil: compress.distil.hint_weight needs networks to learn from, not their answers alone"
        )
    if isinstance(teacher, Sequence) and not teacher:
        raise CompressionError("distil: there is no teacher among those given")
    check_augment(x[:2], settings.augment)


def _check_time(deadline: float | None, epoch: int, epochs: int) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise TimeUpError(
            f"distil: the time is up in epoch {epoch} of {epochs}; give it more, or lower "
            "compress.distil.epochs (compress.prune.recovery_epochs)"
        )


def _check_loss(loss: float, epoch: int, settings: Distil, tell: Tell | None) -> None:
    if not abs(loss) < float("inf"):
        raise CompressionError(
            f"distil: the loss became {loss}; lower compress.distil.learning_rate "
            f"({settings.learning_rate:g})"
        )
    if tell is not None:
        tell(epoch, settings.epochs, loss)


def _loss(answers: Tensor, targets: Tensor | None, y: Tensor | None, settings: Distil) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, cross-entropy on the labels, or their mixture."""
    if targets is None:
        assert y is not None  # noqa: S101  # `_check` has seen to it
        return F.cross_entropy(answers, y)
    soft = softened(answers, targets, settings.temperature).mean()
    if settings.mode == "soft":
        return soft
    assert y is not None  # noqa: S101 - likewise
    return settings.hard_weight * F.cross_entropy(answers, y) + (1 - settings.hard_weight) * soft
