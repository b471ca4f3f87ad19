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


NOBODY = -1  # client of a row that only exists because x is a view, such as a window over two clients' text


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
        DataError: lengths differ, labels are out of range, images hold NaN, a value is infinite, a character
            is none of the labels, or there is nothing in it.
    """

    spec: Spec
    x: Array  # (N, *spec.shape), spec.dtype
    y: npt.NDArray[np.int64]  # (N,) 0 .. classes - 1
    # (N,) natural client of each row, 0 .. K - 1, or NOBODY: the row is no example; None: no clients known
    client: Indices | None = None
    clients: tuple[str, ...] = ()  # name of each natural client, length K
    test: npt.NDArray[np.bool_] | None = None  # (N,) examples that the file sets apart; None: no such split
    overlap: int = 0  # so many next examples of a client share raw values with each; rows are then in order

    def __post_init__(self) -> None:
        """Check everything that later code relies on."""
        n = len(self.x)
        if n == 0:
            raise DataError("data: there is no example in it")
        if self.x.shape[1:] != self.spec.shape or self.x.dtype != np.dtype(self.spec.dtype):
            raise DataError(
                f"data: x is {self.x.dtype} {self.x.shape}; "
                f"it must be {self.spec.dtype} (N, *{self.spec.shape})"
            )
        for name, array, dtype in (
            ("y", self.y, np.int64),
            ("client", self.client, np.int64),
            ("split", self.test, np.bool_),
        ):
            if array is not None and array.shape != (n,):
                raise DataError(f"data: {name} has shape {array.shape}, but x holds {n} examples")
            if array is not None and array.dtype != dtype:
                raise DataError(f"data: {name} is {array.dtype}; a reader must return {np.dtype(dtype)}")
        if self.y.min() < 0 or self.y.max() >= self.spec.classes:
            wrong = int(self.y[(self.y < 0) | (self.y >= self.spec.classes)][0])
            raise DataError(f"data: label {wrong} is out of range 0 .. {self.spec.classes - 1}")
        if self.client is not None and not (
            NOBODY <= self.client.min() <= self.client.max() < len(self.clients) and self.client.max() >= 0
        ):
            raise DataError(
                f"data: client holds {self.client.min()} .. {self.client.max()}, "
                f"but {len(self.clients)} clients are named"
            )
        if self.x.dtype.kind == "f":
            self._check_values()
        elif self.spec.kind == "text" and self.x.max() >= self.spec.classes:
            raise DataError(f"data: code {self.x.max()} is none of the {self.spec.classes} characters")

    def _check_values(self) -> None:
        bad = np.isinf(self.x) if self.spec.allows_missing else ~np.isfinite(self.x)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            column = f" (column {self.spec.features[where[-1]]!r})" if self.spec.features else ""
            raise DataError(
                f"data: x{list(where)}{column} is {self.x[where]}; "
                + ("infinite values, or such beyond float32, cannot be used (NaN marks a missing one)"
                   if self.spec.allows_missing
                   else "an image may hold numbers within float32 only: repair or drop it")
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.y)

    @property
    def examples(self) -> Examples:
        """All rows, to be taken from by position; those of `NOBODY` too."""
        return Examples(self.x, self.y)

    @property
    def usable(self) -> Indices:
        """Positions of the rows that are examples."""
        return np.arange(len(self)) if self.client is None else np.flatnonzero(self.client != NOBODY)

    @property
    def used_examples(self) -> Examples:
        """All examples: a view where every row is one."""
        usable = self.usable
        return self.examples if len(usable) == len(self) else self.examples.take(usable)

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
        if self.spec.kind == "text" and tuple(labels) != self.spec.labels:
            raise DataError("data: text is read with the run's characters (Source.labels), not renamed")
        try:
            spec = replace(self.spec, labels=tuple(labels))
        except FormatError as error:
            raise DataError(str(error)) from error
        return replace(self, spec=spec, y=order[self.y].astype(np.int64))


def stratified(
    groups: npt.NDArray[np.int64],
    fraction: float,
    rng: np.random.Generator,
    clients: Indices | None = None,
) -> tuple[Indices, Indices]:
    """Draw about `fraction` of each group at random: (positions drawn, positions left), both sorted.

    Each group is rounded to the nearest whole number, so a group of one example stays whole.

    Args:
        groups: (N,) class of each example.
        fraction: to draw.
        rng: decides which.
        clients: (N,) natural client of each example. A group is then drawn evenly over its clients, as one
            sequence: rounding each client by itself would draw nothing from clients with few examples.
            Every client keeps one example at least.
    """
    drawn = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        if clients is None:
            drawn[members[: round(len(members) * fraction)]] = True
        else:
            rank = rng.permutation(clients.max() + 1)  # a new order of clients for each group
            members = members[np.argsort(rank[clients[members]], kind="stable")]
            drawn[members] = np.diff(np.rint(np.arange(len(members) + 1) * fraction)) > 0
    if clients is not None:
        kept = set(clients[~drawn].tolist())
        for client in sorted(set(clients.tolist()) - kept):
            drawn[np.flatnonzero(clients == client)[0]] = False
    return np.flatnonzero(drawn), np.flatnonzero(~drawn)


def latest(client: Indices, fraction: float, overlap: int) -> tuple[Indices, Indices]:
    """Set apart the last `fraction` of each client's examples: (positions drawn, positions left), sorted.

    The `overlap` examples before those drawn are in neither part, so that no value stands in both. A client
    with too few for that stays whole.

    Args:
        client: (N,) natural client of each example; a client's examples are in the order in which they arose.
        fraction: to draw.
        overlap: so many next examples share raw values with each.
    """
    order = np.argsort(client, kind="stable")
    drawn, left = [order[:0]], [order[:0]]
    for run in np.split(order, np.flatnonzero(np.diff(client[order])) + 1):
        cut = len(run) - round(len(run) * fraction)
        if cut == len(run) or cut <= overlap:
            left.append(run)
        else:
            drawn.append(run[cut:])
            left.append(run[: cut - overlap])
    return np.sort(np.concatenate(drawn)), np.sort(np.concatenate(left))


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of a data set by purpose; no example serves two (`tests` hold this)."""

    train: Indices  # the clients' own data
    proxy: Indices  # the server's, in the training distribution: distillation and calibration
    test: Indices  # the server's: accuracy of each round, and when to stop
    gate: Indices  # the server's: the release gate, and nothing else


def split(dataset: Dataset, *, holdout: float, gate: float, proxy: float, seed: int) -> Split:
    """Set data apart by purpose, stratified by class and natural client; the same seed, the same split.

    Where examples overlap, each share is the last of each client's instead (`latest`).

    Args:
        dataset: its own test split is used as the hold-out where it has one.
        holdout: fraction held out where it has none.
        gate: fraction of the hold-out that only the gate sees.
        proxy: fraction of the training data that is the server's own.
        seed: decides all of it.

    Raises:
        DataError: too few examples for training, test or gate.
    """
    rng = np.random.default_rng([seed, 0x5711])
    rows, owner = dataset.usable, dataset.client

    def draw(of: Indices, fraction: float, *, by_client: bool = True) -> tuple[Indices, Indices]:
        if dataset.overlap:
            drawn, left = latest(np.zeros(len(of), np.int64) if owner is None else owner[of], fraction,
                                 dataset.overlap)  # fmt: skip
        else:
            natural = owner[of] if owner is not None and by_client else None
            drawn, left = stratified(dataset.y[of], fraction, rng, natural)
        return of[drawn], of[left]

    if dataset.test is not None:
        held, rest = rows[dataset.test[rows]], rows[~dataset.test[rows]]
    else:
        held, rest = draw(rows, holdout)
    gated, tested = draw(held, gate, by_client=False)
    proxied, trained = draw(rest, proxy)
    parts = Split(trained, proxied, tested, gated)
    for name in ("train", "test", "gate"):
        if len(getattr(parts, name)) == 0:
            raise DataError(
                f"data: {len(dataset)} examples leave none for {name}; bring more data or change "
                "evaluate.holdout_fraction and evaluate.gate_fraction"
            )
    return parts
