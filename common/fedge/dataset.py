"""Labelled examples in memory, checked once where they enter, and the seeded ways to set some apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError, FormatError
from fedge.spec import Spec

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Examples:
    """Raw inputs and class indices; views of one array wherever possible."""

    x: Array  # (N, *spec.shape), spec.dtype
    y: npt.NDArray[np.int64]  # (N,) 0 .. classes - 1

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: Indices) -> Examples:
        """The examples at these positions."""
        return Examples(self.x[indices], self.y[indices])


@dataclass(frozen=True, slots=True)
class Dataset:
    """A whole data set as a task's reader returns it; construction checks it.

    Raises:
        DataError: lengths differ, labels are out of range, images hold NaN, a value is infinite, or
            there is nothing in it.
    """

    spec: Spec
    x: Array  # (N, *spec.shape), spec.dtype
    y: npt.NDArray[np.int64]  # (N,) 0 .. classes - 1
    client: Indices | None = None  # (N,) natural client of each example, 0 .. K - 1; None: none known
    clients: tuple[str, ...] = ()  # name of each natural client, length K
    test: npt.NDArray[np.bool_] | None = None  # (N,) examples that the file sets apart; None: no such split

    def __post_init__(self) -> None:
        """Check everything that later code relies on."""
        n = len(self.x)
        if n == 0:
            raise DataError("data: there is no example in it")
        if self.x.shape[1:] != self.spec.shape or self.x.dtype != np.dtype(self.spec.dtype):
            raise DataError(
                f"data: x is {self.x.dtype} {self.x.shape}; it must be {self.spec.dtype} (N, *{self.spec.shape})"
            )
        for name, array in (("y", self.y), ("client", self.client), ("split", self.test)):
            if array is not None and array.shape != (n,):
                raise DataError(f"data: {name} has shape {array.shape}, but x holds {n} examples")
        if self.y.min() < 0 or self.y.max() >= self.spec.classes:
            wrong = int(self.y[(self.y < 0) | (self.y >= self.spec.classes)][0])
            raise DataError(f"data: label {wrong} is out of range 0 .. {self.spec.classes - 1}")
        if self.x.dtype.kind == "f":
            self._check_values()

    def _check_values(self) -> None:
        bad = np.isinf(self.x) if self.spec.kind == "features" else ~np.isfinite(self.x)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"data: x{list(where)} is {self.x[where]}; "
                + ("infinite values cannot be used (NaN marks a missing one)" if self.spec.kind == "features"
                   else "an image may hold finite numbers only: repair or drop it")
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.y)

    @property
    def examples(self) -> Examples:
        """All of it as one set of examples."""
        return Examples(self.x, self.y)

    def with_labels(self, labels: Sequence[str]) -> Dataset:
        """The same data under another order of labels (a client may hold only some of the classes).

        Raises:
            DataError: the data has a label that is not among them.
        """
        missing = [label for label in self.spec.labels if label not in labels]
        present = {self.spec.labels[i] for i in np.unique(self.y)}
        if unknown := sorted(present & set(missing)):
            raise DataError(f"data: label {unknown[0]!r} is not among the run's labels {list(labels)}")
        order = np.array([labels.index(name) if name in labels else -1 for name in self.spec.labels])
        try:
            spec = replace(self.spec, labels=tuple(labels))
        except FormatError as error:
            raise DataError(str(error)) from error
        return replace(self, spec=spec, y=order[self.y].astype(np.int64))


def stratified(groups: npt.NDArray[np.int64], fraction: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Draw about `fraction` of each group at random: (positions drawn, positions left), both sorted.

    Each group is rounded to the nearest whole number, so a group of one example stays whole.
    """
    drawn = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        drawn[members[: round(len(members) * fraction)]] = True
    return np.flatnonzero(drawn), np.flatnonzero(~drawn)


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of a data set by purpose; no example serves two (`tests` hold this)."""

    train: Indices  # the clients' own data
    proxy: Indices  # the server's, in the training distribution: distillation and calibration
    test: Indices  # the server's: accuracy of each round, and when to stop
    gate: Indices  # the server's: the release gate, and nothing else


def split(
    dataset: Dataset, *, holdout: float, gate: float, proxy: float, seed: int
) -> Split:
    """Set data apart by purpose, stratified by class and natural client; the same seed, the same split.

    Args:
        dataset: its own test split is used as the hold-out where it has one.
        holdout: fraction held out where it has none.
        gate: fraction of the hold-out that only the gate sees.
        proxy: fraction of the training data that is the server's own.
        seed: decides all of it.
    """
    rng = np.random.default_rng([seed, 0x5711])
    natural = dataset.client if dataset.client is not None else np.zeros(len(dataset), dtype=np.int64)
    groups = natural * dataset.spec.classes + dataset.y
    if dataset.test is not None:
        held, rest = np.flatnonzero(dataset.test), np.flatnonzero(~dataset.test)
    else:
        held, rest = stratified(groups, holdout, rng)
    gated, tested = stratified(dataset.y[held], gate, rng)
    proxied, trained = stratified(groups[rest], proxy, rng)
    parts = Split(rest[trained], rest[proxied], held[tested], held[gated])
    for name in ("train", "test", "gate"):
        if len(getattr(parts, name)) == 0:
            raise DataError(
                f"data: {len(dataset)} examples leave none for {name}; bring more data or change "
                "evaluate.holdout_fraction and evaluate.gate_fraction"
            )
    return parts
