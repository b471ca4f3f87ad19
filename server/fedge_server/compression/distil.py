"""A small network learns the answers of a large one (Hinton, Vinyals, Dean 2015).

"Distilling the Knowledge in a Neural Network", arXiv:1503.02531: the student is trained on the teacher's
probabilities, softened by a temperature T, and where wanted on the true labels as well. Both networks take
the same pre-processed inputs, so teacher and student share one pre-processing.

Shapes: N examples, B batch, C classes.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedge.config import Distil
from fedge.errors import CompressionError, ConfigError
from fedge.learning import draws
from fedge.learning.augment import augment
from fedge.learning.threads import fitted

_CHUNK = 256  # examples that go through a network at once where nothing is learned


def distil(
    teacher: nn.Module | Tensor, student: nn.Module, x: Tensor, y: Tensor, settings: Distil, *, seed: int
) -> nn.Module:
    """A copy of the student, trained to answer as the teacher does; neither argument is changed.

    With augmentation the teacher sees the same altered batch as the student ("consistent teaching", Beyer
    et al. 2022); without, it answers once.

    Args:
        teacher: network from pre-processed inputs to logits (B, C); or its answers to x, (N, C), which
            go with no augmentation.
        student: network of the same interface; its weights are the starting point.
        x: pre-processed inputs (N, ...), float32.
        y: true classes (N,), int64; mode "soft" does not look at them.
        settings: mode, temperature, epochs and the like.
        seed: decides the order of the examples, augmentation and dropout.

    Raises:
        CompressionError: fewer than two examples, or the loss ceased to be finite.
        ConfigError: an augmentation does not fit the inputs.
    """
    if len(x) < 2:
        raise CompressionError(f"distil: {len(x)} examples are too few to learn from; bring more proxy data")
    check_augment(x[:2], settings.augment)
    student, known = copy.deepcopy(student).train(), None
    if isinstance(teacher, Tensor):
        known = teacher
    else:
        teacher = copy.deepcopy(teacher).eval()
        known = logits(teacher, x) if settings.mode != "hard" and not settings.augment else None
    batches = -(-len(x) // settings.batch_size)
    optimizer = torch.optim.Adam(student.parameters(), settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=batches * settings.epochs
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), fitted(student, settings.batch_size):
        torch.manual_seed(seed)
        for _ in range(settings.epochs):
            # Parts of nearly equal size: a last batch of one example would break batch normalisation.
            for chosen in torch.randperm(len(x), generator=generator).tensor_split(batches):
                inputs = augment(x[chosen], settings.augment, draws.keys_from(generator, len(chosen)))
                targets = _targets(teacher, inputs, None if known is None else known[chosen], settings)
                loss = _loss(student(inputs), targets, y[chosen], settings)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            if not torch.isfinite(loss):
                raise CompressionError(
                    f"distil: the loss became {loss.item()}; lower compress.distil.learning_rate "
                    f"({settings.learning_rate:g})"
                )
    return student.eval()


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


def _targets(
    teacher: nn.Module | Tensor, inputs: Tensor, known: Tensor | None, settings: Distil
) -> Tensor | None:
    """The teacher's logits (B, C) for this batch; None where they are not used."""
    if settings.mode == "hard":
        return None
    return known if known is not None or isinstance(teacher, Tensor) else logits(teacher, inputs)


def _loss(answers: Tensor, targets: Tensor | None, y: Tensor, settings: Distil) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, cross-entropy on the labels, or their mixture.

    The factor T^2 keeps the gradient's size independent of T (section 2 of the paper).
    """
    if targets is None:
        return F.cross_entropy(answers, y)
    T = settings.temperature
    soft = T**2 * F.kl_div(
        F.log_softmax(answers / T, dim=1),
        F.log_softmax(targets / T, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    if settings.mode == "soft":
        return soft
    return settings.hard_weight * F.cross_entropy(answers, y) + (1 - settings.hard_weight) * soft
