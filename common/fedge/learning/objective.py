"""What a step goes down, and how: the loss of each example, and the optimiser.

Legend: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional as F

from fedge.config import Train
from fedge.learning.lessons import Loss, taught
from fedge.learning.terms import Lesson

FOCAL_GAMMA = 2.0  # Lin et al. 2017, Focal Loss for Dense Object Detection


def losses(settings: Train, lesson: Lesson | None = None) -> Loss:
    """The loss of each example: cross_entropy (smoothed), focal (Lin et al. 2017), multi_margin.

    In a lesson it takes targets in place of classes (`lessons`).
    """

    def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y, label_smoothing=settings.label_smoothing, reduction="none")

    def focal(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(logits, dim=1).gather(1, y[:, None]).squeeze(1)  # (B,)
        return -((1 - log_p.exp()) ** FOCAL_GAMMA) * log_p

    def multi_margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # sum over k != y of max(0, 1 - z_y + z_k), over K; the term k = y is always 1. Torch's own has no
        # batching rule.
        margins = (1 - logits.gather(1, y[:, None]) + logits).clamp(min=0)  # (B, K)
        return (margins.sum(1) - 1) / logits.shape[1]

    named: dict[str, Loss] = {"cross_entropy": cross_entropy, "focal": focal, "multi_margin": multi_margin}
    own = named[settings.loss]
    return own if lesson is None else taught(own, lesson)


def optimizer(parameters: Iterable[torch.Tensor], settings: Train) -> torch.optim.Optimizer:
    """A fresh torch optimiser; all of them work value by value, so stacked clients do not mix."""
    parameters = list(parameters)
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
