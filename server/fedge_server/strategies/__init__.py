"""Aggregation rules by name: Flower's Message-API strategies, taken from Flower as they are, and ours.

Those that are a weighted mean, or start from one, have it formed as the updates come (`mean`). Those that
some clients cannot spoil stand in `robust`.

FedXgb* are left out: they aggregate trees. So are Flower's wrappers for differential privacy, whose noise
shrinks with every missing reply: `[privacy]` works with every strategy that is linear, and keeps count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from fedge.config import Config, StrategyConfig, Train, suggestion
from fedge.errors import ConfigError
from fedge.learning.freezing import entries
from fedge.learning.messages import TRAIN_LOSS, Update
from fedge.learning.terms import PLAIN as PLAIN_TERMS
from fedge.learning.terms import Lesson, Terms
from fedge.task import Task
from fedge_server.data import ServerData
from fedge_server.privacy.rules import check as check_privacy
from fedge_server.privacy.rules import check_terms
from fedge_server.strategies import fedavg
from fedge_server.strategies.asynchronous import Asynchronous, FedAsync, FedBuff
from fedge_server.strategies.feddf import FedDf
from fedge_server.strategies.fednova import FedNova
from fedge_server.strategies.fedsgd import FedSgd
from fedge_server.strategies.mean import ACCUMULATE
from fedge_server.strategies.personal import Ditto, FedBn, FedPer
from fedge_server.strategies.robust import RULES
from fedge_server.strategies.scaffold import Scaffold

PLAIN: Mapping[str, type[FedAvg]] = {
    **{
        name.lower(): found
        for name in flower.__all__
        if inspect.isclass(found := getattr(flower, name)) and issubclass(found, FedAvg) and "Xgb" not in name
    },
    **{
        found.__name__.lower(): found
        for found in (
            fedavg.FedAvg,
            fedavg.FedProx,
            fedavg.FedAvgM,
            fedavg.FedAdagrad,
            fedavg.FedAdam,
            fedavg.FedYogi,
            *RULES,
        )
    },
    **{
        found.__name__.lower(): found
        for found in (FedBuff, FedAsync, FedSgd, FedNova, Scaffold, FedPer, FedBn, Ditto, FedDf)
    },
}
# Those that use no more of the updates than their weighted mean: noise and masks may hide single ones. The
# classes themselves and not their subclasses, which may look at single updates.
LINEAR: frozenset[type[Strategy]] = frozenset(
    (
        fedavg.FedAvg,
        fedavg.FedProx,
        fedavg.FedAvgM,
        fedavg.FedAdagrad,
        fedavg.FedAdam,
        fedavg.FedYogi,
        FedSgd,
        FedPer,
        FedBn,
        Ditto,
    )
)
# Those that take partial sums besides: what FedNova makes of clients with equal steps is linear too.
SUMS: frozenset[type[Strategy]] = LINEAR | {FedNova}
# Those that go through the updates once, in any order, and keep none: they get each as it arrives. All others
# get a list in the order of the clients.
SINGLE_PASS: frozenset[type[Strategy]] = SUMS | {Scaffold, FedBuff, FedAsync}
NAMES = tuple(sorted(PLAIN))

# Set by fedge from the rest of the configuration, so not a user's option.
_OURS = {
    "self", "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes",
    "min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key",
    "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "parameter_names", "selection_rule", "kwargs",
    "args", "network", "population", "train", "run", "task", "data",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """A strategy ready to run, and all that it asks of clients."""

    strategy: Strategy
    update: Update  # what clients send in place of the state
    terms: Terms = PLAIN_TERMS  # what they do, send and keep besides

    @property
    def sums(self) -> bool:
        """Whether one reply may stand for many clients: it uses only means, and their apps need not run."""
        return type(self.strategy) in SUMS and not self.terms.keeps

    @property
    def like(self) -> Callable[[int], Mapping[str, npt.NDArray[np.generic]]] | None:
        """The state of a client's model by node id, where not all have the global one."""
        found: Callable[[int], Mapping[str, npt.NDArray[np.generic]]] | None
        found = getattr(self.strategy, "like", None)
        return found

    @property
    def single_pass(self) -> bool:
        """Whether it takes updates as they arrive, each once."""
        return type(self.strategy) in SINGLE_PASS


def build(
    config: Config,
    *,
    network: nn.Module,
    population: int = 1,
    task: Task | None = None,
    data: ServerData | None = None,
    lesson: Lesson | None = None,
) -> Chosen:
    """The strategy that `[strategy]` names, with its own options.

    It asks whoever its Grid lists: which clients those are is decided in `rounds.sampling`.

    Args:
        config: the run's configuration.
        network: the global model.
        population: clients that there are.
        task: of the run; for strategies that build models.
        data: of the server; for strategies that learn from it.
        lesson: what clients learn besides their labels.

    Raises:
        ConfigError: unknown name or option (the line names the nearest), a value the strategy refuses, or a
            strategy that does not go with `[privacy]`.
    """
    chosen = config.strategy
    if chosen.name.startswith("dp-"):
        raise ConfigError(
            f"strategy.name = {chosen.name!r}: is gone; give a plain strategy, such as 'fedavg', and "
            "privacy.mechanism = 'central' with privacy.clip_norm and privacy.noise_multiplier"
        )
    if chosen.name not in PLAIN:
        raise ConfigError(f"strategy.name = {chosen.name!r}: {suggestion(chosen.name, NAMES)}")
    check_privacy(config, linear=PLAIN[chosen.name] in LINEAR)
    frozen = entries(network, config.train.freeze)
    names = tuple(name for name, _ in network.named_parameters() if name not in frozen)
    given = {
        "parameter_names": names,
        "network": network,
        "population": population,
        "train": config.train,
        "run": config,
        "task": task,
        "data": data,
    }
    made = _plain(config, chosen, given)
    if isinstance(made, Asynchronous):
        _refuse_what_waits(config, made.buffer)
    terms = replace(getattr(made, "terms", PLAIN_TERMS), frozen=frozen, lesson=lesson)
    _check_frozen(chosen.name, terms, network)
    check_terms(config, terms)
    if config.rounds.sampling == "size":
        _refuse_what_weighs_twice(config)
    if config.rounds.local_work == "adaptive":
        _refuse_what_hides_clients(config, terms)
    return Chosen(made, "gradient" if chosen.name == "fedsgd" else "weights", terms)


def _check_frozen(name: str, terms: Terms, network: nn.Module) -> None:
    """Refuse what leaves a strategy nothing to do, or two rules for one entry."""
    if terms.frozen and name == "feddf":
        raise ConfigError(
            "train.freeze: with strategy 'feddf' clients have models of their own with other parts; "
            "leave it out"
        )
    if both := sorted(set(terms.own) & set(terms.frozen)):
        raise ConfigError(
            f"train.freeze: freezes {both[0]!r}, which strategy {name!r} lets each device train for itself"
        )
    if not any(
        n not in (*terms.own, *terms.frozen) for n, p in network.named_parameters() if p.requires_grad
    ):
        raise ConfigError(
            f"train.freeze: with strategy {name!r}, nothing is left that clients learn together"
        )


def _plain(config: Config, chosen: StrategyConfig, given: Mapping[str, Any]) -> FedAvg:
    found = PLAIN[chosen.name]
    ours: dict[str, Any] = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "train_metrics_aggr_fn": fedavg.weighted_metrics,
        "evaluate_metrics_aggr_fn": fedavg.weighted_metrics,
    }
    taken = inspect.signature(found.__init__).parameters
    ours |= {key: value for key, value in given.items() if key in taken}
    if chosen.name == "fedsgd":
        _refuse_what_fedsgd_ignores(config.train)
    if chosen.name == "qfedavg":
        if config.train.schedule != "constant":
            raise ConfigError(
                f"train.schedule = {config.train.schedule!r}: strategy 'qfedavg' measures changes in steps "
                "of one learning rate; set 'constant'"
            )
        ours |= {"train_loss_key": TRAIN_LOSS}
        chosen = StrategyConfig(
            name=chosen.name, options={"client_learning_rate": config.train.learning_rate, **chosen.options}
        )
    made: FedAvg = _construct(found, chosen, ours)
    if isinstance(made, fedavg.Stepped):
        made.parameter_names = given["parameter_names"]
    return made


def _refuse_what_fedsgd_ignores(train: Train) -> None:
    default = Train()
    for key in ("epochs", "learning_rate", "schedule", "optimizer", "momentum"):
        if (value := getattr(train, key)) != getattr(default, key):
            raise ConfigError(
                f"train.{key} = {value!r}: has no effect with strategy 'fedsgd', whose server steps; set "
                "strategy.optimizer, strategy.learning_rate and strategy.momentum"
            )


def _refuse_what_waits(config: Config, buffer: int) -> None:
    """What asks all clients of a round at once, or counts on one answer from each."""
    rounds = config.rounds
    for key, wrong, why in (
        ("evaluate.federated", config.evaluate.federated, "would call clients away from their work"),
        ("privacy.mechanism", config.privacy.mechanism != "none", "counts one answer of a client in a round"),
        ("communication.codec", bool(config.communication.codec), "codes changes of this round's model"),
        ("rounds.sampling", rounds.sampling != "fixed", "draws a round's clients, and here they go on"),
        ("rounds.local_work", rounds.local_work != "fixed", "compares clients that were asked together"),
        ("rounds.fit_work", rounds.fit_work, "fits clients' work to a deadline that nobody waits for"),
        ("rounds.quorum", rounds.quorum < 1, "has no effect: strategy.buffer updates close a round"),
        ("rounds.min_updates", rounds.min_updates > buffer, f"is above the {buffer} that close a round"),
    ):
        if wrong:
            name = config.strategy.name
            raise ConfigError(f"{key}: {why}, so it does not go with strategy {name!r}; leave it out")


def _refuse_what_weighs_twice(config: Config) -> None:
    """Where clients are drawn by size, the plain mean of what was drawn is the right one."""
    privacy, name = config.privacy, config.strategy.name
    for key, wrong, why in (
        (f"strategy.name = {name!r}", PLAIN[name] not in LINEAR, "does more than average what was drawn"),
        ("privacy.mechanism", privacy.mechanism != "none", "counts each client once"),
        ("privacy.secure_aggregation", privacy.secure_aggregation, "clients weigh their changes themselves"),
        (
            "rounds.fit_work",
            config.rounds.fit_work,
            "clients then tell what they trained on, not what they have",
        ),
    ):
        if wrong:
            raise ConfigError(f"rounds.sampling = 'size': {key}: {why}; leave one of them out")


def _refuse_what_hides_clients(config: Config, terms: Terms) -> None:
    """What keeps a round from showing how long clients take, which way they go, and what is gained."""
    name = f"strategy.name = {config.strategy.name!r}"
    for key, wrong, why in (
        ("privacy.mechanism", config.privacy.mechanism != "none", "times and directions of clients show"),
        ("privacy.secure_aggregation", config.privacy.secure_aggregation, "nobody sees a single change"),
        ("rounds.fit_work", config.rounds.fit_work, "decides how much a client works, too"),
        (name, config.strategy.name == "fedsgd", "clients make exactly one pass"),
        (name, config.strategy.name == "feddf", "clients' models differ, and cannot be compared"),
        (name, bool(terms.own), "the server has no whole model whose loss could fall"),
    ):
        if wrong:
            raise ConfigError(f"rounds.local_work = 'adaptive': {key}: {why}; leave one of them out")


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that a strategy of this name takes in the configuration."""
    parameters = inspect.signature(PLAIN[name].__init__).parameters
    found = {key: parameter for key, parameter in parameters.items() if key not in _OURS}
    return {**found, "accumulate": _ACCUMULATE} if issubclass(PLAIN[name], fedavg.FedAvg) else found


# An attribute of its own: the constructors of Flower's subclasses between ours do not pass it on.
_ACCUMULATE = inspect.Parameter(
    "accumulate", inspect.Parameter.KEYWORD_ONLY, default=fedavg.FedAvg.accumulate, annotation=str
)


def _construct(found: Any, chosen: StrategyConfig, ours: Mapping[str, Any]) -> Any:
    valid = options_of(chosen.name)
    for key in chosen.options:
        if key not in valid:
            hint = suggestion(key, list(valid)) if valid else "it takes none"
            raise ConfigError(f"unknown key 'strategy.{key}' for strategy {chosen.name!r}: {hint}")
    for key, parameter in valid.items():
        if parameter.default is inspect.Parameter.empty and key not in chosen.options:
            raise ConfigError(f"strategy {chosen.name!r} needs the key 'strategy.{key}'")
        value = chosen.options.get(key)
        if value is not None and isinstance(value, str) != ("str" in str(parameter.annotation)):
            raise ConfigError(f"strategy.{key} = {value!r}: must be {parameter.annotation}")
    options = dict(chosen.options)
    accumulate = options.pop("accumulate", _ACCUMULATE.default)
    if accumulate not in ACCUMULATE:
        raise ConfigError(f"strategy.accumulate = {accumulate!r}: {suggestion(str(accumulate), ACCUMULATE)}")
    try:
        made = found(**ours, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"strategy {chosen.name!r}: {error}") from error
    if "accumulate" in valid:
        made.accumulate = accumulate
    return made
