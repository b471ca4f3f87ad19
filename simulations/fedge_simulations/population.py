"""Who holds which examples: dealt out once, or drawn for each client when it takes part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.dataset import Indices
from fedge_simulations.lazy import Lazy

_DRAWS: Final = 0xD4A3  # tells the generators of clients from others of the same seed
_LOOK: Final = 1000  # clients whose sizes are looked at to describe a population that is not listed


class Population(Lazy[Indices]):
    """The clients of a simulation: client i holds the examples at these positions of the data set."""

    def __init__(
        self, count: int, make: Callable[[int], Indices], size: Callable[[int], int], *, drawn: bool
    ) -> None:
        """Say how to find a client's examples.

        Args:
            count: how many clients there are.
            make: positions of the examples of client i, the same at each call.
            size: how many these are, without finding them.
            drawn: they are found anew at each call, and clients may share examples.
        """
        super().__init__(count, make)
        self.size, self.drawn = size, drawn

    @classmethod
    def dealt(cls, parts: Sequence[Indices]) -> Population:
        """Clients whose examples are known."""
        return cls(len(parts), parts.__getitem__, lambda i: len(parts[i]), drawn=False)

    def describe(self) -> str:
        """How many clients there are and what they hold, in a few words."""
        sizes = [self.size(i) for i in range(min(len(self), _LOOK) if self.drawn else len(self))]
        if not self.drawn:
            return f"{len(self)} clients with {min(sizes)} to {max(sizes)} examples ({sum(sizes)} in all"
        mean = sum(sizes) / len(sizes)
        return f"{len(self)} clients with {mean:.0f} examples on average (drawn for each"


def drawn(
    train: Indices,
    y: npt.NDArray[np.int64],
    clients: int,
    *,
    size: int,
    alpha: float | None = None,
    size_sigma: float = 0.0,
    seed: int = 0,
) -> Population:
    """Clients that each draw their examples by (seed, i); two of them may hold the same example.

    Args:
        train: positions to draw from.
        y: labels at these positions.
        clients: how many there are; a million cost as much as one.
        size: examples of a client, or their median.
        alpha: shares of the classes are a draw from a Dirichlet distribution of this concentration; None:
            examples are drawn whatever their class.
        size_sigma: sigma of the logarithm of the sizes.
        seed: of the run.
    """
    members = [np.flatnonzero(y == label) for label in np.unique(y)]

    def start(i: int) -> tuple[np.random.Generator, int]:
        rng = np.random.Generator(np.random.Philox(key=((seed << 32 | _DRAWS) << 64) + i))
        count = size if not size_sigma else round(size * float(np.exp(size_sigma * rng.standard_normal())))
        return rng, min(max(count, 1), len(train))

    def make(i: int) -> Indices:
        rng, count = start(i)
        if alpha is None:
            return _some(rng, train, count)
        counts = rng.multinomial(count, rng.dirichlet(np.full(len(members), alpha)))
        parts = [_some(rng, own, n) for own, n in zip(members, counts, strict=True)]
        found: Indices = train[np.concatenate(parts)]
        return found

    return Population(
        clients, make, (lambda i: start(i)[1]) if size_sigma else lambda _: min(size, len(train)), drawn=True
    )


def _some(rng: np.random.Generator, members: Indices, count: int) -> Indices:
    """So many of a class; each once, unless more are wanted than there are."""
    if count <= len(members):
        chosen = rng.choice(len(members), count, replace=False)
    else:
        chosen = rng.integers(0, len(members), count)
    found: Indices = members[chosen]
    return found
