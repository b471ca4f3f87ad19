"""The source of one run's compression: the server's own data or the clients, by what there is."""

from __future__ import annotations

from collections.abc import Callable

from fedge.config import Config
from fedge.learning.whole import WholeModel
from fedge.statistics import Moments
from fedge.task import Task
from fedge_server.compression.clients import Clients, Fleet
from fedge_server.compression.sources import OnServer, Source, kind_of
from fedge_server.data import ServerData


def source_of(
    config: Config,
    task: Task,
    data: ServerData,
    model: WholeModel,
    *,
    moments: Moments | None = None,
    fleet: Fleet | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """The source of a run's compression.

    Args:
        config: of the run.
        task: of the run.
        data: the server's.
        model: the global one.
        moments: by which its inputs are standardised; for clients, who are told them.
        fleet: how clients can be asked; None: they cannot.
        say: takes a line of progress.

    Raises:
        ConfigError: `compress.data` names what is not there.
    """
    kind = kind_of(config, data.proxy, clients=fleet is not None)
    if kind == "clients":
        assert fleet is not None  # noqa: S101 - `kind_of` has looked
        return Clients(config, task, data, fleet, model, moments, say)
    return OnServer.of(kind, config, data, model)
