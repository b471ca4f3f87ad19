"""A student learns a teacher's answers to a client's own examples (Hinton, Vinyals, Dean 2015).

"Distilling the Knowledge in a Neural Network", arXiv:1503.02531. Where a loss takes classes (B,), that of a
lesson takes *targets* (B, 1 + K): each example's class, and what the teacher answered to it. A lesson may
leave out what the teacher answers wrongly (Meng, Li, Zhao, Gong 2019, "Conditional Teacher-Student
Learning").

Legend: B batch, N examples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from fedge.learning.terms import Lesson

_CHUNK = 256  # examples that a teacher answers at once

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (B, K) and class indices (B,), in a lesson targets, to the loss of each example (B,)."""


def softened(answers: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T of each example, (B,), from logits (B, K) of both.

    The factor T^2 keeps the gradient's size independent of T (section 2 of the paper).
    """
    T = temperature
    each = F.kl_div(
        F.log_softmax(answers / T, dim=1),
        F.log_softmax(teacher / T, dim=1),
        log_target=True,
        reduction="none",
    )
    return T**2 * each.sum(1)


def taught(own: Loss, lesson: Lesson) -> Loss:
    """The loss of a lesson: of logits (B, K) and targets (B, 1 + K), (B,).

    Args:
        own: of logits and classes, for the labels' part.
        lesson: temperature, and the labels' weight.
    """
    weight = lesson.hard_weight

    def where_right(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        classes = targets[:, 0].long()
        right = targets[:, 1:].argmax(1) == classes
        hard, soft = own(answers, classes), softened(answers, targets[:, 1:], lesson.temperature)
        return torch.where(right, weight * hard + (1 - weight) * soft, hard)

    def loss(answers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        soft = softened(answers, targets[:, 1:], lesson.temperature)
        if not weight:
            return soft
        return weight * own(answers, targets[:, 0].long()) + (1 - weight) * soft

    return where_right if lesson.where_right else loss


@torch.no_grad()
def answered(teacher: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Targets (N, 1 + K) of pre-processed inputs (N, ...) and their classes (N,).

    Classes are numbers of the inputs' precision here: exact up to 2^24 of them.
    """
    logits = torch.cat([teacher(part) for part in torch.split(x, _CHUNK)])
    return torch.cat([y[:, None].to(logits.dtype), logits], dim=1)
