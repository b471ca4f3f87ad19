"""Many clients' models as one tensor, and the batches that they train on together.

Legend: K clients of a stack, k of them active, D values of a model, R examples of a batch, N of a client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedge.config import Train
from fedge.learning import draws, local
from fedge.learning.augment import augment
from fedge.learning.lessons import answered
from fedge.learning.state import NamedArrays

if TYPE_CHECKING:
    from fedge_simulations.engine.steppers import Recipe

Named = dict[str, torch.Tensor]
CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each entry of a model's state lies in one flat vector of D values."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, state: NamedArrays) -> Layout:
        """The layout of a state, in its order."""
        return cls({name: tuple(value.shape) for name, value in state.items()})

    @property
    def size(self) -> int:
        """D."""
        return sum(prod(shape) for shape in self.shapes.values())

    def views(self, flat: torch.Tensor) -> Named:
        """The entries of (k, D) as (k, *shape), sharing its memory."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + prod(shape)
            found[name] = flat[:, start:stop].view(len(flat), *shape)
            start = stop
        return found

    def flat(self, state: NamedArrays, dtype: torch.dtype) -> torch.Tensor:
        """A state as (D,)."""
        parts = [torch.from_numpy(np.array(state[name])).reshape(-1).to(dtype) for name in self.shapes]
        return torch.cat(parts)

    def arrays(self, flat: npt.NDArray[Any], like: NamedArrays) -> NamedArrays:
        """One client's (D,) as named arrays in the dtypes of `like`, sharing its memory where they agree."""
        found, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + prod(shape)
            found[name] = flat[start:stop].reshape(shape).astype(like[name].dtype, copy=False)
            start = stop
        return found

    def scattered(self, arrays: NamedArrays) -> torch.Tensor:
        """Some entries of a state as (D,) float32, with 0 for all others."""
        nothing = {name: np.zeros(shape, np.float32) for name, shape in self.shapes.items()}
        return self.flat({**nothing, **arrays}, torch.float32)

    def fill(self, flat: torch.Tensor, states: Sequence[NamedArrays]) -> None:
        """Put states into (K, D); one that consists of the very arrays of the first is not read again."""
        flat.copy_(self.flat(states[0], flat.dtype))
        for row, state in zip(flat[1:], states[1:], strict=True):
            if any(state[name] is not states[0][name] for name in self.shapes):
                row.copy_(self.flat(state, flat.dtype))


def rows_of(k: int, size: int, device: torch.device = CPU) -> torch.Tensor:
    """Room for k models, (k, D) float32, of which each begins at a multiple of 64 bytes.

    Matrix products round otherwise where their operands lie otherwise: so that a client's result does not
    depend on its place in a stack, every row lies alike.
    """
    return torch.empty(k, -(-size // 16) * 16, device=device)[:, :size]


@dataclass(frozen=True, slots=True)
class Pull:
    """What is added to each client's gradients: mu (w - anchor), where the recipe has a mu, and shift."""

    anchor: torch.Tensor | None = None  # (K, D); None: the weights at the start
    shift: torch.Tensor | None = None  # (K, D), 0 for buffers; None: nothing

    def to(self, device: torch.device) -> Pull:
        """The same, elsewhere."""
        return Pull(
            None if self.anchor is None else self.anchor.to(device),
            None if self.shift is None else self.shift.to(device),
        )


NO_PULL = Pull()


class Stepper(Protocol):
    """Trains the models of a stack, a step of all active ones at a time."""

    recipe: Recipe  # between two stacks another may take its place that differs in passes and learning rate

    def begin(self, flat: torch.Tensor, pull: Pull = NO_PULL) -> None:
        """Take over (K, D) at the weights to start from; steps change it in place."""

    def step(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, keys: torch.Tensor
    ) -> torch.Tensor:
        """One step of the first k clients, k never growing: the loss of each, (k,).

        Args:
            x: (k, R, ...) pre-processed and augmented.
            y: (k, R); in a lesson (k, R, 1 + C).
            weight: (k, R) 1 for an example and 0 for padding; None: there is no padding.
            keys: (k,) what each client's step draws from.
        """

    def end(self) -> None:
        """Leave the trained models in the tensor that `begin` was given."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """The data of a stack's clients, those with most steps first; all but x and y in main memory."""

    x: torch.Tensor  # (M, ...) pre-processed, where the models are
    y: torch.Tensor  # (M,), likewise; in a lesson (M, 1 + C)
    rows: torch.Tensor  # (sum of N,) which of these are whose, one client after the other
    lengths: torch.Tensor  # (K,) N of each
    keys: torch.Tensor  # (K,) of each client in this round
    # Examples of the largest client of the round: batches are filled up to its. Some CPUs' kernels round by
    # the number of rows, and a client's result must not depend on whom it is stacked with. 0: of the stack.
    longest: int = 0
    # In a lesson, where steps alter their examples: answers each; else its answers stand in y, (M, 1 + C).
    teacher: torch.nn.Module | None = None


def train(
    stepper: Stepper,
    flat: torch.Tensor,
    data: Stacked,
    settings: Train,
    least: int,
    pull: Pull = NO_PULL,
) -> torch.Tensor:
    """Train all of a stack in place; each client's mean loss over the examples that it saw, (K,).

    Args:
        stepper: makes the steps.
        flat: (K, D) global weights, changed in place.
        data: of the clients.
        settings: the run's `[train]`.
        least: smallest batch that may stand at the end of a pass; above 1 only with equal lengths.
        pull: what is added to gradients.
    """
    steps = -(-int(data.lengths.max()) // settings.batch_size) * settings.epochs
    keys = local.step_keys(
        data.keys, torch.arange(steps)[:, None]
    )  # (T, K): in one go, since each call costs
    there, device = keys.to(flat.device), flat.device
    losses = torch.zeros(steps, len(flat), dtype=torch.float64, device=device)
    seen = torch.zeros(steps, len(flat), dtype=torch.float64)
    stepper.begin(flat, pull)
    for step, (index, valid) in enumerate(schedule(data, settings, least)):
        k, rows = index.shape
        chosen = index.reshape(-1).to(device)  # (k * R,)
        x = data.x.index_select(0, chosen)
        if settings.augment:
            x = augment(x, settings.augment, local.example_keys(there[step, :k], rows).reshape(-1))
        x = x.view(k, rows, *x.shape[1:])
        y = data.y.index_select(0, chosen).view(k, rows, *data.y.shape[1:])
        if data.teacher is not None:  # client by client: a stack must not show in what it answers
            pairs = zip(x, y, strict=True)
            y = torch.stack([answered(data.teacher, own, truth) for own, truth in pairs])
        weight = None if valid is None else valid.to(device, flat.dtype)
        losses[step, :k] = stepper.step(x, y, weight, there[step, :k])
        seen[step, :k] = rows if valid is None else valid.sum(1)
    stepper.end()
    return (losses.cpu() * seen).sum(0).clamp(min=0) / (data.lengths * settings.epochs)


def schedule(
    data: Stacked, settings: Train, least: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches of each step: examples (k, R) of the data, and which of them are none, or None.

    Every client makes its passes at its own pace, so that those still active are the first k and have all
    made the same number of steps.

    Raises:
        ValueError: unequal lengths with `least` above 1.
    """
    lengths, keys = data.lengths, data.keys
    starts = (lengths.cumsum(0) - lengths)[:, None]
    if not data.longest and int(lengths.min()) == int(lengths.max()):
        n = int(lengths[0])
        for epoch in range(settings.epochs):
            order = draws.permutation(local.order_keys(keys, epoch), n)  # (K, N)
            own = data.rows[order + starts]
            for part in torch.split(own, local.batch_sizes(n, settings.batch_size, least=least), dim=1):
                yield part, None
        return
    if least > 1:
        raise ValueError("clients of unequal size cannot be stacked where batches depend on their size")
    for positions, valid in _unequal(lengths, keys, settings, data.longest or int(lengths.max())):
        yield data.rows[positions + starts[: len(positions)]], valid


def _unequal(
    lengths: torch.Tensor, keys: torch.Tensor, settings: Train, largest: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    size, epochs = min(settings.batch_size, largest), settings.epochs
    steps = -(-lengths // size)  # (K,) of one pass
    longest = int(steps.max())
    positions = torch.zeros(len(lengths), longest * epochs, size, dtype=torch.int64)
    valid = torch.zeros(len(lengths), longest * epochs, size, dtype=torch.bool)
    within = torch.arange(longest * size).view(longest, size)
    for epoch in range(epochs):
        order = draws.permutation(local.order_keys(keys, epoch), lengths)  # (K, longest N)
        padded = torch.nn.functional.pad(order, (0, longest * size - order.shape[1]))
        padded = padded.view(len(lengths), longest, size)
        for count in torch.unique(steps).tolist():
            rows = torch.nonzero(steps == count).squeeze(1)
            here = slice(epoch * count, (epoch + 1) * count)
            true = within[:count] < lengths[rows, None, None]  # (rows, count, R)
            positions[rows, here] = torch.where(true, padded[rows, :count], 0)
            valid[rows, here] = true
    active = (steps * epochs)[None] > torch.arange(longest * epochs)[:, None]  # (T, K)
    for step, k in enumerate(active.sum(1).tolist()):
        yield positions[:k, step], valid[:k, step]


def in_order(lengths: Sequence[int], settings: Train) -> list[int]:
    """Positions of clients, those with most steps first; ties by number of examples, then as they came."""
    steps = [-(-n // settings.batch_size) for n in lengths]
    return sorted(range(len(lengths)), key=lambda i: (-steps[i], -lengths[i], i))
