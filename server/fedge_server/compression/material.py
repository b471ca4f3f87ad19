"""What students learn from: pre-processed inputs, their labels, and what the teacher says to them.

Where inputs are altered (`compress.distil.augment`), a teacher would answer the same kind of question again
in each epoch of each student, which costs more than the students' own training: a teacher is large. So it
answers a few altered copies of the data once, and students learn from these (Shen and Xing 2022, "A Fast
Knowledge Distillation Framework for Visual Recognition", keep a teacher's answers to altered inputs in the
same way). `compress.distil.views = 0` asks it anew for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedge.config import Distil
from fedge.learning import draws
from fedge.learning.augment import augment
from fedge_server.compression.distil import distil, logits
from fedge_server.compression.precision import numbers_for

_CHUNK = 256
_VIEWS = 0x71E35  # begins the seed of their alterations


@dataclass(frozen=True, slots=True)
class Material:
    """Training data of students, which all of them share.

    Shapes: N examples, V views of each, C classes.
    """

    teacher: nn.Module
    x: Tensor  # (N, ...) pre-processed
    y: Tensor | None  # (N,); None: not known
    altered: Tensor  # (V, N, ...); empty where nothing is altered, or the teacher is asked anew each time
    answers: Tensor | None  # (V, N, C) of the teacher, or (1, N, C) to x; None: it is asked anew each time

    @classmethod
    def of(cls, teacher: nn.Module, x: Tensor, y: Tensor | None, settings: Distil, *, seed: int) -> Material:
        """Ask the teacher all that can be asked once.

        Args:
            teacher: from pre-processed inputs to logits, in evaluation mode.
            x: (N, ...).
            y: (N,), or None.
            settings: augmentation and views.
            seed: decides how the views are altered.
        """
        nothing = x.new_empty((0, *x.shape))
        if settings.hint_weight or (settings.augment and not settings.views):
            return cls(teacher, x, y, nothing, None)
        if not settings.augment:
            return cls(teacher, x, y, nothing, logits(teacher, x)[None])
        altered = torch.stack([_view(x, settings, seed, number) for number in range(settings.views)])
        return cls(
            teacher, x, y, altered, torch.stack([_answers(teacher, each, settings) for each in altered])
        )

    def teach(
        self, student: nn.Module, settings: Distil, *, seed: int, deadline: float | None = None
    ) -> nn.Module:
        """A copy of the student after `settings.epochs` passes over N examples.

        Raises:
            CompressionError, TimeUpError: as `distil`.
        """
        if self.answers is None:
            return distil(self.teacher, student, self.x, self.y, settings, seed=seed, deadline=deadline)
        if not len(self.altered):
            return distil(self.answers[0], student, self.x, self.y, settings, seed=seed, deadline=deadline)
        views = min(len(self.altered), settings.epochs)
        passes = max(round(settings.epochs / views), 1)
        return distil(
            self.answers[:views].flatten(0, 1),
            student,
            self.altered[:views].flatten(0, 1),
            None if self.y is None else self.y.repeat(views),
            replace(settings, epochs=passes, augment=()),
            seed=seed,
            deadline=deadline,
        )


def _view(x: Tensor, settings: Distil, seed: int, number: int) -> Tensor:
    """All inputs, altered by what seed and number decide; the first view is as it is."""
    if number == 0:
        return x
    generator = torch.Generator().manual_seed(draws.plain_key(seed, _VIEWS, number) & (2**63 - 1))
    parts = [
        augment(part, settings.augment, draws.keys_from(generator, len(part)))
        for part in torch.split(x, _CHUNK)
    ]
    return torch.cat(parts)


def _answers(teacher: nn.Module, x: Tensor, settings: Distil) -> Tensor:
    numbers = numbers_for(settings.precision, teacher, _CHUNK)
    teacher = numbers.laid_out(teacher)
    with torch.no_grad(), numbers.used():
        return torch.cat([teacher(numbers.laid_out(part)).float() for part in torch.split(x, _CHUNK)])
