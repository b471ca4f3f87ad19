"""Deal one data set out to clients: iid, Dirichlet, shards, or as it naturally is.

Each partitioner is a function from labels to lists of positions; a seed decides it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedge.config import Clients
from fedge.dataset import Dataset, Indices
from fedge.errors import ConfigError, DataError
from fedge_simulations.population import Population, drawn

MAX_DRAWS = 100


def iid(n: int, clients: int, rng: np.random.Generator) -> list[Indices]:
    """Equal shares at random, sizes differing by one at most."""
    return [np.sort(part) for part in np.array_split(rng.permutation(n), clients)]


def dirichlet(
    y: npt.NDArray[np.int64], clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Divide each class by its own draw from a Dirichlet distribution; small alpha: few classes per client.

    Hsu, Qi and Brown 2019, Measuring the Effects of Non-Identical Data Distribution. Drawn anew until
    every client has an example.

    Raises:
        ConfigError: after 100 draws some client still has none.
    """
    for _ in range(MAX_DRAWS):
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(y):
            members = rng.permutation(np.flatnonzero(y == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(int)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        dealt = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, dealt)) > 0:
            return dealt
    raise ConfigError(
        f"clients.partition = 'dirichlet:{alpha:g}': leaves a client without data among {clients} clients "
        f"and {len(y)} examples in {MAX_DRAWS} draws; raise alpha or lower clients.count"
    )


def shards(
    y: npt.NDArray[np.int64], clients: int, per_client: int, rng: np.random.Generator
) -> list[Indices]:
    """Sort by label, cut into clients * per_client shards, deal each client `per_client` of them.

    McMahan et al. 2017, section 3, the pathological non-iid partition (there 2 per client).

    Raises:
        ConfigError: there are more shards than examples.
    """
    count = clients * per_client
    if count > len(y):
        raise ConfigError(
            f"clients.partition = 'shards:{per_client}': {count} shards for {len(y)} examples; "
            "lower clients.count or the shards per client"
        )
    shuffled = rng.permutation(len(y))  # so that equal labels are in random order
    pieces = np.array_split(shuffled[np.argsort(y[shuffled], kind="stable")], count)
    dealt = rng.permutation(count).reshape(clients, per_client)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in dealt]


def natural(client: Indices, names: tuple[str, ...]) -> list[Indices]:
    """One client per natural client of the data.

    Raises:
        DataError: one of them has no training data.
    """
    parts = [np.flatnonzero(client == code) for code in range(len(names))]
    if empty := [name for name, part in zip(names, parts, strict=True) if len(part) == 0]:
        raise DataError(
            f"data: client {empty[0]!r} has no training example; remove it or lower "
            "evaluate.holdout_fraction and evaluate.proxy_fraction"
        )
    return parts


def people(dataset: Dataset, train: Indices, clients: Clients, seed: int) -> Population:
    """The clients of a simulation, by the configured partition; errors as in `deal`."""
    kind, _, value = clients.partition.partition(":")
    if clients.size_sigma and kind != "draw":
        raise ConfigError(
            f"clients.size_sigma = {clients.size_sigma:g}: for clients.partition = 'draw:SIZE' only; "
            f"{clients.partition!r} has sizes of its own"
        )
    if kind != "draw":
        return Population.dealt(deal(dataset, train, clients, seed))
    if len(train) == 0:
        raise ConfigError("clients.partition: there are no training examples to draw from")
    size, _, alpha = value.partition(":")
    return drawn(
        train,
        dataset.y[train],
        clients.wanted,
        size=int(size),
        alpha=float(alpha) if alpha else None,
        size_sigma=clients.size_sigma,
        seed=seed,
    )


def deal(dataset: Dataset, train: Indices, clients: Clients, seed: int) -> list[Indices]:
    """Positions in the data set of each client's training examples, by the configured partition.

    Raises:
        ConfigError: more clients than examples, or a partition that the data does not allow.
        DataError: a natural client without data.
    """
    kind, _, value = clients.partition.partition(":")
    if kind == "natural":
        if dataset.client is None:
            raise ConfigError(
                "clients.partition = 'natural': the data names no clients; add an array or column client"
            )
        if clients.count not in (None, len(dataset.clients)):
            raise ConfigError(
                f"clients.count = {clients.count}: the data has {len(dataset.clients)} natural clients; "
                "leave clients.count out"
            )
        return [train[part] for part in natural(dataset.client[train], dataset.clients)]
    if clients.wanted > len(train):
        raise ConfigError(
            f"clients.count = {clients.wanted}: more clients than the {len(train)} training examples"
        )
    rng, y = np.random.default_rng([seed, 0xDEA1]), dataset.y[train]
    if kind == "iid":
        parts = iid(len(train), clients.wanted, rng)
    elif kind == "dirichlet":
        parts = dirichlet(y, clients.wanted, float(value), rng)
    else:
        parts = shards(y, clients.wanted, int(value), rng)
    return [train[part] for part in parts]
