"""The server's own data: what it distils, tests and gates with. Clients' data never comes here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedge.config import Config
from fedge.dataset import Dataset, Examples, Indices, Split, split
from fedge.errors import ConfigError
from fedge.spec import Spec
from fedge.task import Source, Task


@dataclass(frozen=True, slots=True)
class ServerData:
    """Examples by purpose; no example serves two."""

    spec: Spec
    proxy: Examples  # in the training distribution: distillation and calibration; may be empty
    test: Examples  # accuracy of each round, and when to stop
    gate: Examples  # the release gate, and nothing else
    test_owners: Indices | None = None  # natural client of each test example; None: not known

    def digest(self) -> str:
        """SHA-256 over spec and examples by purpose: a resumed run must find the same data again."""
        sha = hashlib.sha256(json.dumps(self.spec.to_json(), sort_keys=True).encode())
        for part in (self.proxy, self.test, self.gate):
            sha.update(str(part.x.shape).encode())
            sha.update(np.ascontiguousarray(part.x).tobytes())
            sha.update(part.y.tobytes())
        return sha.hexdigest()


def source_of(config: Config) -> Source:
    """The configuration's `data*` keys."""
    return Source(
        Path(config.data) if config.data is not None else None,
        config.data_label,
        config.data_client,
        config.data_size,
    )


def split_of(config: Config, dataset: Dataset) -> Split:
    """The configuration's split of a data set by purpose.

    Raises:
        ConfigError: clients were to keep examples back, and the data's share values.
        DataError: too few examples.
    """
    settings, source = config.evaluate, config.compress.data
    judged = source == "clients" or (source == "auto" and settings.proxy_fraction == 0)
    if settings.client_holdout and not settings.federated and not judged:
        raise ConfigError(
            "evaluate.client_holdout: nothing is measured on what clients keep back; set evaluate.federated "
            "= true or compress.data = 'clients', or leave it out"
        )
    if settings.client_holdout and dataset.overlap:
        raise ConfigError(
            "evaluate.client_holdout: this task's examples overlap, so those kept back would share values "
            "with those trained on; leave it out"
        )
    return split(
        dataset,
        holdout=settings.holdout_fraction,
        gate=settings.gate_fraction,
        proxy=settings.proxy_fraction,
        seed=config.seed,
    )


def server_part(dataset: Dataset, parts: Split) -> ServerData:
    """The server's share of a data set that a simulation divides among server and clients."""
    whole = dataset.examples
    owners = None if dataset.client is None else dataset.client[parts.test]
    return ServerData(
        dataset.spec, whole.take(parts.proxy), whole.take(parts.test), whole.take(parts.gate), owners
    )


def own_data(config: Config, task: Task) -> ServerData:
    """A deployed server's data: all of its file is its own, so its training part is proxy data too.

    Raises:
        DataError: the file cannot be used.
    """
    dataset = task.read(source_of(config))
    parts = split_of(config, dataset)
    proxy = np.sort(np.concatenate([parts.train, parts.proxy]))
    return server_part(dataset, Split(parts.train, proxy, parts.test, parts.gate))


def data_of_run(config: Config, task: Task, digest: str) -> ServerData | None:
    """The server's data of a run again, divided as in deployment or simulation; None: it has changed.

    Args:
        config: of the run.
        task: of the run.
        digest: that the run was begun with.

    Raises:
        DataError: the file cannot be used.
    """
    dataset = task.read(source_of(config))
    simulated = server_part(dataset, split_of(config, dataset))
    return next((data for data in (simulated, own_data(config, task)) if data.digest() == digest), None)
