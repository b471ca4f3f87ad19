"""Aggregation rules by name: Flower's Message-API strategies, taken from Flower as they are, and ours.

Those that are a weighted mean, or start from one, have it computed tensor by tensor (`fedavg`).

FedXgb* are left out: they aggregate trees. The differential-privacy wrappers go around a base strategy
(`base = "fedavg"`); they are for experiments, not for protection: the noise comes from the run's seed, so
that a run can be repeated and resumed, and whoever knows the seed can take it out again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Strategy

from fedge.config import Config, StrategyConfig, Train, suggestion
from fedge.errors import ConfigError
from fedge.learning.messages import TRAIN_LOSS, Update
from fedge_server.strategies import fedavg
from fedge_server.strategies.fedsgd import FedSgd

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
        )
    },
    "fedsgd": FedSgd,
}
WRAPPERS: Mapping[str, type[Strategy]] = {
    "dp-server-fixed": flower.DifferentialPrivacyServerSideFixedClipping,
    "dp-server-adaptive": flower.DifferentialPrivacyServerSideAdaptiveClipping,
    "dp-client-fixed": flower.DifferentialPrivacyClientSideFixedClipping,
    "dp-client-adaptive": flower.DifferentialPrivacyClientSideAdaptiveClipping,
}
DP_BASES = ("fedavg", "fedprox")
# Those that use no more of the updates than their weighted mean: one reply may stand for many clients. The
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
    )
)
NAMES = tuple(sorted([*PLAIN, *WRAPPERS]))

# Set by fedge from the rest of the configuration, so not a user's option.
_OURS = {
    "self", "fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes",
    "min_available_nodes", "weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key",
    "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "strategy", "num_sampled_clients", "accountant",
    "parameter_names", "selection_rule", "kwargs", "args",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chosen:
    """A strategy ready to run, and what clients must be told besides."""

    strategy: Strategy
    update: Update  # what clients send
    client_config: Mapping[str, str]  # further keys of the train messages
    further_metrics: frozenset[str] = frozenset()  # what a client mod adds to an update's metrics

    @property
    def linear(self) -> bool:
        """Whether it takes partial sums: it uses only the weighted mean, and no client mod is switched on."""
        return type(self.strategy) in LINEAR and not self.client_config


def build(config: Config, *, cohort: int, parameter_names: tuple[str, ...]) -> Chosen:
    """The strategy that `[strategy]` names, with its own options.

    It asks whoever its Grid lists: which clients those are is decided in `rounds.sampling`.

    Args:
        config: the run's configuration.
        cohort: clients that a round asks; the differential-privacy wrappers scale their noise by it.
        parameter_names: trainable entries of the model's state; the others are buffers.

    Raises:
        ConfigError: unknown name or option (the line names the nearest), or a value the strategy refuses.
    """
    chosen = config.strategy
    if chosen.name in WRAPPERS:
        return _wrapped(config, cohort, parameter_names)
    if chosen.name not in PLAIN:
        raise ConfigError(f"strategy.name = {chosen.name!r}: {suggestion(chosen.name, NAMES)}")
    made, update = _plain(config, chosen, parameter_names)
    return Chosen(made, update, {})


def _plain(config: Config, chosen: StrategyConfig, parameter_names: tuple[str, ...]) -> tuple[FedAvg, Update]:
    found = PLAIN[chosen.name]
    ours: dict[str, Any] = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
        "train_metrics_aggr_fn": fedavg.weighted_metrics,
        "evaluate_metrics_aggr_fn": fedavg.weighted_metrics,
    }
    if chosen.name == "fedsgd":
        _refuse_what_fedsgd_ignores(config.train)
        ours["parameter_names"] = parameter_names
    if chosen.name == "qfedavg":
        ours |= {"train_loss_key": TRAIN_LOSS}
        chosen = StrategyConfig(
            name=chosen.name, options={"client_learning_rate": config.train.learning_rate, **chosen.options}
        )
    return _construct(found, chosen, ours), "gradient" if chosen.name == "fedsgd" else "weights"


def _refuse_what_fedsgd_ignores(train: Train) -> None:
    default = Train()
    for key in ("epochs", "learning_rate", "optimizer", "momentum"):
        if (value := getattr(train, key)) != getattr(default, key):
            raise ConfigError(
                f"train.{key} = {value!r}: has no effect with strategy 'fedsgd', whose server steps; set "
                "strategy.optimizer, strategy.learning_rate and strategy.momentum"
            )


def _wrapped(config: Config, cohort: int, parameter_names: tuple[str, ...]) -> Chosen:
    options = dict(config.strategy.options)
    base_name = str(options.pop("base", "fedavg"))
    if base_name not in DP_BASES:
        hint = suggestion(base_name, DP_BASES)
        raise ConfigError(f"strategy.base = {base_name!r}: the noise fits a mean of updates only; {hint}")
    if config.rounds.quorum < 1 or config.rounds.deadline_s is not None:
        raise ConfigError(
            f"strategy {config.strategy.name!r}: its noise is for all clients of a round; with "
            "rounds.quorum or rounds.deadline_s a round could close with fewer and too little noise"
        )
    base, update = _plain(config, StrategyConfig(name=base_name), parameter_names)
    ours = {"strategy": base, "num_sampled_clients": cohort}
    outer = StrategyConfig(name=config.strategy.name, options=options)
    made = _construct(WRAPPERS[outer.name], outer, ours)
    told = {"clipping": "adaptive"} if outer.name == "dp-client-adaptive" else {}
    return Chosen(made, update, told, frozenset({"norm_bit"} if told else ()))


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options that a strategy of this name takes in the configuration."""
    found = PLAIN.get(name) or WRAPPERS[name]
    parameters = inspect.signature(found.__init__).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in _OURS}


def _construct(found: Any, chosen: StrategyConfig, ours: Mapping[str, Any]) -> Any:
    valid = options_of(chosen.name)
    for key in chosen.options:
        if key not in valid:
            names = [*valid, "base"] if chosen.name in WRAPPERS else list(valid)
            hint = suggestion(key, names) if names else "it takes none"
            raise ConfigError(f"unknown key 'strategy.{key}' for strategy {chosen.name!r}: {hint}")
    for key, parameter in valid.items():
        if parameter.default is inspect.Parameter.empty and key not in chosen.options:
            raise ConfigError(f"strategy {chosen.name!r} needs the key 'strategy.{key}'")
        value = chosen.options.get(key)
        if value is not None and isinstance(value, str) != ("str" in str(parameter.annotation)):
            raise ConfigError(f"strategy.{key} = {value!r}: must be {parameter.annotation}")
    try:
        return found(**ours, **chosen.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"strategy {chosen.name!r}: {error}") from error
