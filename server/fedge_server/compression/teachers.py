"""Whom a student learns from: one network or several, and what their hidden layers can tell it.

Several answer with the mean of their probabilities, softened first (Hinton, Vinyals, Dean 2015, section 3).
Hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio 2015, "FitNets: Hints for Thin Deep Nets",
arXiv:1412.6550): the student's hidden layer is to say what the teacher's does, through a linear regressor
that is learned beside it and thrown away. The layers are chosen by one rule: what goes into the layer that
gives the answer, in both. The paper trains the hint first and the answer then; here both together.

Shapes: N examples, B batch, C classes, K teachers, F a student's hidden values, G those of all teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedge.errors import CompressionError
from fedge_server.compression.layers import Tap
from fedge_server.compression.precision import Numbers

_CHUNK = 256  # examples that go through a network at once where nothing is learned
_SCALE_FROM = 1024  # examples that say how large hidden values are


class Teachers:
    """Networks that answer together; copies in evaluation mode."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        temperature: float,
        numbers: Numbers,
        *,
        example: Tensor,
        taps: bool,
    ) -> None:
        """Copy them.

        Args:
            networks: from pre-processed inputs to logits (B, C).
            temperature: softens probabilities before they are averaged.
            numbers: what they compute in.
            example: pre-processed inputs, to find the last layers.
            taps: whether their hidden values are wanted too.
        """
        self._networks = [numbers.laid_out(copy.deepcopy(network).eval()) for network in networks]
        self._temperature, self._numbers = temperature, numbers
        self._taps = [Tap(network, example) for network in self._networks] if taps else []

    @torch.no_grad()
    def teach(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Answers (B, C), logits at the temperature, and hidden values (B, G) where they are wanted."""
        with self._numbers.used():
            given = [network(self._numbers.laid_out(x)).float() for network in self._networks]
        hidden = torch.cat([tap.take() for tap in self._taps], dim=1) if self._taps else None
        return pooled(given, self._temperature), hidden

    def teach_all(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for many examples, some at a time."""
        parts = [self.teach(x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)]
        hidden = [h for _, h in parts if h is not None]
        return torch.cat([answers for answers, _ in parts]), torch.cat(hidden) if hidden else None


def pooled(given: Sequence[Tensor], temperature: float) -> Tensor:
    """Logits (B, C) whose softmax at the temperature is the mean of the teachers' softened probabilities."""
    if len(given) == 1:
        return given[0]
    softened = torch.stack([F.log_softmax(logits / temperature, dim=1) for logits in given])  # (K, B, C)
    means: Tensor = softened.logsumexp(0) - torch.log(torch.tensor(float(len(given))))
    return temperature * means


class Hints:
    """The regressor from a student's hidden values to its teachers', and what it is still off by."""

    def __init__(self, student: nn.Module, teachers: Teachers, x: Tensor) -> None:
        """Look at both networks.

        Args:
            student: a copy that nobody else uses.
            teachers: with taps.
            x: pre-processed inputs; the first of them say how large the teachers' hidden values are.
        """
        _, hidden = teachers.teach_all(x[:_SCALE_FROM])
        if hidden is None:
            raise CompressionError("distil: hints need networks to learn from, not answers alone")
        self._tap = Tap(student, x[:2])
        # One scale for all, so that the loss is 1 for whoever knows the mean alone, whatever the teacher.
        self._scale = hidden.sub(hidden.mean(0)).square().mean().clamp(min=1e-12)
        with torch.no_grad():
            student_values = self._width(student, x[:2])
        self.regressor = nn.Linear(student_values, hidden.shape[1])

    def _width(self, student: nn.Module, example: Tensor) -> int:
        training = student.training
        student.eval()(example)
        student.train(training)
        return self._tap.take().shape[1]

    def loss(self, hidden: Tensor) -> Tensor:
        """Mean squared difference after the student's forward pass, in the teachers' variance."""
        return F.mse_loss(self.regressor(self._tap.take()), hidden) / self._scale

    def close(self) -> None:
        """Leave the student as a network of its own."""
        self._tap.close()
