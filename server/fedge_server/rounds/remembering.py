"""Rounds in which clients learn something new, and hold to what an earlier model answered.

Z. Li, D. Hoiem, "Learning without Forgetting" (IEEE TPAMI 2018), with one head: the loss is (1 - r) of the
labels' and r of the distillation loss from the frozen model that the run began with, on the client's own
examples. Their tasks had other classes. Here the classes are the same and the inputs have changed, so that
the earlier model may be wrong, and surely so: where it is, the label alone counts
(`fedge.learning.lessons`).

Old examples are not needed. Where devices keep some (rehearsal), they only have to be among a client's own.

That model is a lesson's teacher like any other; it is part of the run's state, since its file may be gone
when the run is taken up again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import nn

from fedge.config import Config, Distil
from fedge.errors import ConfigError
from fedge.learning.state import load_arrays
from fedge.task import Task
from fedge_server.data import ServerData
from fedge_server.registry.database import Registry
from fedge_server.rounds.starting import start_of
from fedge_server.rounds.teaching import REMEMBERED, Teacher, Teaching
from fedge_server.strategies.state import beside_of


def remembering(
    config: Config,
    task: Task,
    data: ServerData,
    registry: Registry,
    run_id: str,
    *,
    network: nn.Module,
    keep: bool,
) -> Teaching | None:
    """The lesson of a run that is to remember its `model.start`; None: it is not.

    Args:
        config: of the run.
        task: of the run.
        data: the server's.
        registry: holds the run's state, and releases.
        run_id: its name.
        network: of the run's architecture.
        keep: clients are to keep the earlier model.

    Raises:
        ConfigError: it does not go with the rest, or has other classes.
    """
    check_remember(config)
    if not config.model.remember:
        return None
    last, earlier = registry.last_round(run_id), copy.deepcopy(network)
    if last is None:
        start = start_of(config, task, data, registry, network)
        if start.origin["new"]:
            raise ConfigError(
                "model.remember: the classes of model.start are others, so it has no answers to hold to; "
                "leave remember out"
            )
        load_arrays(earlier, start.arrays)
    else:
        kept: Mapping[str, npt.NDArray[Any]] = beside_of(last.state)
        load_arrays(
            earlier, {name[len(REMEMBERED) :]: a for name, a in kept.items() if name.startswith(REMEMBERED)}
        )
    name = config.model.name or task.default_model
    settings = Distil(
        mode="both", temperature=config.model.remember_temperature, hard_weight=1 - config.model.remember
    )
    return Teaching(earlier, Teacher.of(name, earlier, None, keep=keep), settings, lasts=True)


def check_remember(config: Config) -> None:
    """Refuse what does not go with `model.remember`.

    Raises:
        ConfigError: the strategy or the privacy of clients.
    """
    if not config.model.remember:
        return
    privacy = config.privacy.mechanism
    if config.strategy.name == "fedsgd":
        raise ConfigError("model.remember: is part of clients' training, and 'fedsgd' only sends gradients")
    if privacy in ("local", "example", "distributed"):
        raise ConfigError(
            f"model.remember: with privacy.mechanism = {privacy!r} devices protect plain training; "
            "leave remember out"
        )
