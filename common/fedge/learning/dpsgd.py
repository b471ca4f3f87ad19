"""DP-SGD on a device (Abadi et al. 2016, Deep Learning with Differential Privacy).

Each step draws every example by itself (Poisson), cuts each one's gradient to a norm, adds noise to their sum
and divides by the number expected. Gradients of single examples come from torch.func, which takes any module
as it is; opacus would want its own layers in place of recurrent ones, and hooks in all others.

Legend: B examples of a step, N of this client, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

from fedge.config import Train
from fedge.errors import DataError
from fedge.learning import draws
from fedge.learning.augment import augment
from fedge.learning.guard import Guard
from fedge.noise import clip_factor, noise_on_grid, step_of, uniform

Named = dict[str, torch.Tensor]
PIECE_BYTES = 32 * 1024**2  # of the gradients of single examples that are held at once, as float64


@dataclass(frozen=True, slots=True)
class Plan:
    """How often an example may be looked at, which is all that its epsilon depends on.

    It is the same for every device. Were it each one's own, the smallest would not be the one whose examples
    cost most: with a noise multiplier of .6, half of the examples in each of two steps costs more than all of
    them in one.
    """

    sampling: float  # probability with which each example is in a step
    steps: int

    @classmethod
    def of(cls, min_examples: int, settings: Train) -> Plan:
        """As many steps as the smallest device has batches; a larger one has larger batches.

        Args:
            min_examples: that a device has, from 1.
            settings: the run's `[train]`.
        """
        batches = math.ceil(min_examples / settings.batch_size)
        return cls(1 / batches, batches * settings.epochs)


Step = Callable[[Named], None]
"""Makes one step of an optimiser along these gradients."""


def train_privately(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    settings: Train,
    guard: Guard,
    *,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    step: Step,
    seed: int,
    secret: bytes,
) -> int:
    """Train the model in place; returns the steps made.

    Args:
        model: in training mode, at the global weights.
        x: (N, ...) pre-processed.
        y: (N,) class indices.
        settings: the run's `[train]`.
        guard: of kind example.
        loss_of: the loss of each example.
        step: of the optimiser; what it adds must not depend on the data.
        seed: decides augmentation and dropout.
        secret: decides batches and noise; for this one training.

    Raises:
        DataError: there are fewer examples than the accounting counts on.
    """
    if len(y) < guard.min_examples:
        raise DataError(
            f"data: {len(y)} examples, but the run takes clients with {guard.min_examples} or more "
            "(privacy.min_examples)"
        )
    plan = Plan.of(guard.min_examples, settings)
    sigma = guard.clip_norm * guard.noise_multiplier
    grid = step_of(guard.clip_norm, sigma)
    gradients, client = _Gradients(model, loss_of), draws.key(seed)
    for number in range(plan.steps):
        drawn = uniform(secret, f"batch {number}", len(y)) < plan.sampling
        chosen = torch.from_numpy(np.flatnonzero(drawn))
        keys = draws.derive(draws.derive(client, number), chosen)
        inputs = augment(x[chosen], settings.augment, keys)
        total = gradients.clipped_sum(inputs, y[chosen], guard.clip_norm, grid)
        for name, value in total.items():
            noise = noise_on_grid(secret, f"step {number} {name}", value.numel(), sigma, grid)
            value += torch.from_numpy(noise).reshape(value.shape)
            value *= grid / (len(y) * plan.sampling)
        step(total)
    return plan.steps


class _Gradients:
    """Gradients of single examples, many at once where the model allows it."""

    def __init__(
        self, model: nn.Module, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self._model, self._loss_of = model, loss_of
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        size = sum(p.numel() for p in self._parameters.values())
        self._at_once = max(1, PIECE_BYTES // (8 * size))
        self._batched = True

    def clipped_sum(self, x: torch.Tensor, y: torch.Tensor, clip_norm: float, grid: float) -> Named:
        """The sum over examples of clipped gradients, in whole steps of a grid, float64."""
        total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in self._parameters.items()}
        for found in self._of_examples(x, y):
            wide = {name: value.double() for name, value in found.items()}
            norms = sum(value.flatten(1).square().sum(1) for value in wide.values())
            assert isinstance(norms, torch.Tensor)  # noqa: S101 - a model without parameters cannot be trained
            factors = torch.tensor([clip_factor(n, clip_norm) / grid for n in norms.sqrt().tolist()]).double()
            for name, value in wide.items():
                shaped = factors.reshape(-1, *[1] * (value.dim() - 1))
                total[name] += (value * shaped).trunc().sum(0)
        return total

    def _of_examples(self, x: torch.Tensor, y: torch.Tensor) -> Iterator[Named]:
        """Gradients with one row for each example, so many at a time."""
        for start in range(0, len(y), self._at_once):
            part = slice(start, start + self._at_once)
            if self._batched:
                try:
                    yield self._together(x[part], y[part])
                    continue
                except RuntimeError:  # an operation that has no batching rule, such as torch's recurrent ones
                    self._batched = False
            for i in range(start, min(start + self._at_once, len(y))):
                yield self._alone(x[i : i + 1], y[i : i + 1])

    def _together(self, x: torch.Tensor, y: torch.Tensor) -> Named:
        buffers = dict(self._model.named_buffers())

        def loss(parameters: Named, one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            answer = functional_call(self._model, {**parameters, **buffers}, (one[None],))
            return self._loss_of(answer, label[None])[0]

        detached = {name: p.detach() for name, p in self._parameters.items()}
        each = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
        found, _ = each(detached, x, y)
        return dict(found)

    def _alone(self, x: torch.Tensor, y: torch.Tensor) -> Named:
        loss = self._loss_of(self._model(x), y)[0]
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        return {
            name: (torch.zeros_like(p) if g is None else g)[None]
            for (name, p), g in zip(self._parameters.items(), found, strict=True)
        }
