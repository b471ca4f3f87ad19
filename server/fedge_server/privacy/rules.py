"""What may stand together with a privacy mechanism, decided before anything runs."""

from __future__ import annotations

import math

from torch import nn

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.guard import Guard
from fedge.learning.local import least_batch
from fedge.learning.terms import Terms
from fedge_server.privacy.central import Settings
from fedge_server.secagg.graph import LEAST


def check(config: Config, *, linear: bool) -> None:
    """Refuse what would make the stated epsilon a wrong one.

    Args:
        config: of the run.
        linear: whether the strategy uses nothing but the mean of the updates.

    Raises:
        ConfigError: the line names the key, why it does not fit, and what would.
    """
    if config.privacy.secure_aggregation:
        _check_secure(config, linear=linear)
    elif config.privacy.mechanism == "distributed":
        raise ConfigError(
            "privacy.mechanism = 'distributed': a share of the noise hides no single update; set "
            "privacy.secure_aggregation = true"
        )
    if config.privacy.mechanism == "none":
        if config.rounds.sampling == "poisson" and config.rounds.cohort is not None:
            raise ConfigError(_POISSON_COHORT)
        return
    for wrong, message in (
        (config.model.standardise, _STANDARDISE),
        (config.evaluate.federated, _FEDERATED),
        (config.evaluate.leave_one_client_out or config.evaluate.folds is not None, _LEFT_OUT),
        (config.rounds.sampling == "poisson" and config.rounds.cohort is not None, _POISSON_COHORT),
    ):
        if wrong:
            raise ConfigError(message)
    if config.privacy.mechanism == "central":
        _check_central(config, linear=linear)
        return
    if config.privacy.mechanism == "distributed":
        _check_quorum(config)
    if config.privacy.adaptive_clip:
        raise ConfigError(
            f"privacy.adaptive_clip: the server counts who is clipped, and with privacy.mechanism = "
            f"{config.privacy.mechanism!r} it must not know; leave it out"
        )
    if config.strategy.name == "qfedavg":
        raise ConfigError(
            "strategy.name = 'qfedavg': needs each client's exact training loss, which no noise covers; take "
            "another one with a privacy.mechanism"
        )
    if config.privacy.mechanism == "example" and config.strategy.name == "fedsgd":
        raise ConfigError(
            "strategy.name = 'fedsgd': privacy.mechanism = 'example' protects the steps that a device makes, "
            "and here the server makes them; take 'fedavg'"
        )


def check_terms(config: Config, terms: Terms) -> None:
    """Refuse what a strategy has clients send or keep where it does not go with the rest.

    Raises:
        ConfigError: noise or masks do not cover what they send besides; or compression and stopping need a
            whole model on the server, and parts of it stay on devices; or a codec would gain little.
    """
    name, protected = config.strategy.name, config.privacy
    if (terms.steps or terms.control) and (protected.mechanism != "none" or protected.secure_aggregation):
        raise ConfigError(
            f"strategy.name = {name!r}: clients send {'their steps' if terms.steps else 'control variates'} "
            "besides, which neither noise nor masks of [privacy] cover; take one that averages"
        )
    if terms.control and config.communication.codec:
        raise ConfigError(
            f"communication.codec: with strategy.name = {name!r} control variates travel whole beside each "
            "update; leave one of them out"
        )
    if name == "fedavgm" and config.communication.downlink:
        raise ConfigError(
            "communication.downlink: strategy.name = 'fedavgm' measures from a state of its own, and clients "
            "hold another by what the codec leaves out; leave one of them out"
        )
    wrong = [
        ("tiers", config.tiers),
        ("rounds.target", config.rounds.target),
        ("rounds.patience", config.rounds.patience),
    ]
    for key, value in wrong:
        if terms.own and value:
            raise ConfigError(
                f"{key}: with strategy.name = {name!r} the server has no whole model: what stays on devices "
                "is there as it was at first; leave it out, and set evaluate.federated = true"
            )


def _check_secure(config: Config, *, linear: bool) -> None:
    """Refuse what needs single updates, or sends something else of a client past the masks."""
    privacy, rounds = config.privacy, config.rounds
    beside = "privacy.secure_aggregation"
    for wrong, what, why in (
        (
            not linear,
            f"strategy.name = {config.strategy.name!r}",
            f"looks at single updates, which nobody sees with {beside}; take one that averages",
        ),
        (
            privacy.mechanism == "central",
            "privacy.mechanism = 'central'",
            f"the server clips each update, and sees none with {beside}; take 'distributed'",
        ),
        (
            privacy.mechanism == "local",
            "privacy.mechanism = 'local'",
            f"hides each update already, and pays more for it than for a sum; leave {beside} out",
        ),
        (
            config.model.standardise,
            "model.standardise = true",
            f"each client's moments would be sent as they are; set it to false with {beside}",
        ),
        (
            config.evaluate.federated,
            "evaluate.federated = true",
            f"each client's loss, accuracy and count would be sent as they are; leave it out with {beside}",
        ),
        (
            config.evaluate.leave_one_client_out or config.evaluate.folds is not None,
            "evaluate.leave_one_client_out, evaluate.folds",
            f"sums that differ in few clients tell what these sent; leave them out with {beside}",
        ),
        (
            config.evaluate.anomalies is True,
            "evaluate.anomalies = true",
            f"nobody sees a single update that could stand out with {beside}; leave it out",
        ),
        (
            rounds.fit_work,
            "rounds.fit_work = true",
            f"each client's count and time would be looked at; leave it out with {beside}",
        ),
        (
            config.scenario.attackers > 0,
            "scenario.attackers",
            f"change what is sent on its way, which spoils a masked sum; leave it out with {beside}",
        ),
        (
            bool(config.communication.codec),
            f"communication.codec = {list(config.communication.codec)}",
            f"masks are as long as the model whatever they hide; leave it out with {beside}",
        ),
        (
            config.communication.keep_frozen,
            "communication.keep_frozen = true",
            f"what comes under masks does not say who holds anything; leave it out with {beside}",
        ),
        (
            config.validate.of_singles,
            "[validate]",
            f"no norm and no number of examples is seen with {beside}; leave the table out",
        ),
        (
            rounds.quorum < 1 - privacy.secure_dropouts,
            f"rounds.quorum = {rounds.quorum}",
            f"leaves out more clients than privacy.secure_dropouts = {privacy.secure_dropouts} allows for",
        ),
    ):
        if wrong:
            raise ConfigError(f"{what}: {why}")


def _check_central(config: Config, *, linear: bool) -> None:
    if not linear:
        raise ConfigError(
            f"strategy.name = {config.strategy.name!r}: privacy.mechanism = 'central' adds noise to a sum, "
            "and this strategy looks at single updates, whose influence the noise does not cover; take one "
            "that averages, such as 'fedavg'"
        )
    codec = config.communication.uplink
    if codec is not None and codec.remembers and config.rounds.sampling == "poisson":
        raise ConfigError(
            "communication.error_feedback = true: what a client sends then shows the rounds it was asked in "
            "before, and the smaller epsilon of rounds.sampling = 'poisson' needs these to be secret; set it "
            "to false, or take sampling 'fixed'"
        )
    if config.evaluate.anomalies:
        raise ConfigError(
            "evaluate.anomalies = true: would write down of each update, without noise, how far it lies from "
            "the others; leave it out with privacy.mechanism = 'central'"
        )
    if config.validate.max_norm_ratio is not None:
        raise ConfigError(
            f"validate.max_norm_ratio = {config.validate.max_norm_ratio:g}: follows the clients' norms, "
            "which no noise covers with privacy.mechanism = 'central'; set validate.max_norm"
        )
    _check_quorum(config)


def _check_quorum(config: Config) -> None:
    if config.rounds.quorum < 1:
        raise ConfigError(
            f"rounds.quorum = {config.rounds.quorum}: where the first so many close a round, one client more "
            "pushes another out and moves the sum by twice privacy.clip_norm; leave it 1 and set "
            "rounds.deadline_s"
        )


def check_model(config: Config, network: nn.Module) -> None:
    """Refuse a model in which one example of a batch shows in what the others give.

    Raises:
        ConfigError: it has batch normalisation and the mechanism protects examples.
    """
    if config.privacy.mechanism == "example" and least_batch(network) > 1:
        raise ConfigError(
            f"model.name = {config.model.name!r}: batch normalisation mixes the examples of a batch, so that "
            "none has a gradient of its own; take a model without it for privacy.mechanism = 'example'"
        )


def check_population(config: Config, expected: int, population: int) -> None:
    """Refuse what only shows once the number of clients is known.

    Args:
        config: of the run.
        expected: clients that a round counts on.
        population: clients that there are.

    Raises:
        ConfigError: delta is so large that it promises nothing, or the count's noise is too small.
    """
    mechanism = config.privacy.mechanism
    if mechanism != "example" and config.privacy.delta * population >= 1:
        raise ConfigError(
            f"privacy.delta = {config.privacy.delta:g}: with {population} clients it must be below "
            f"{1 / population:g}: at 1 / clients, publishing all data of one of them would pass"
        )
    if mechanism != "central":
        return
    try:
        _ = settings_of(config, config.privacy.clip_norm, expected).change_multiplier
    except ValueError as error:
        raise ConfigError(
            f"privacy.noise_multiplier = {config.privacy.noise_multiplier:g} with adaptive_clip: {error}; "
            "raise privacy.clip_count_sigma, lower the noise, or ask more clients"
        ) from error


def settings_of(config: Config, clip_norm: float, expected: int) -> Settings:
    """How a round with this clipping norm is protected."""
    privacy = config.privacy
    count_sigma = None
    if privacy.adaptive_clip:
        count_sigma = privacy.clip_count_sigma or expected / 20  # as in Andrew et al. 2021
    return Settings(clip_norm, privacy.noise_multiplier, expected, count_sigma)


def guard_of_shares(config: Config, expected: int) -> Guard:
    """What devices are told of their share of a sum's noise.

    The whole noise is that of as few clients as a sum is opened with, less those that may tell their shares:
    with more there is more noise than promised.

    Args:
        config: of the run.
        expected: clients of a round.
    """
    privacy = config.privacy
    honest = least_of(config, expected) - math.floor(privacy.secure_corrupt * expected)
    return Guard("distributed", privacy.clip_norm, privacy.noise_multiplier, least=max(honest, 1))


def least_of(config: Config, expected: int) -> int:
    """Clients in a sum that secure aggregation opens.

    Where devices share out the noise, as many as are left when `privacy.secure_dropouts` of them are lost.

    Args:
        config: of the run.
        expected: clients of a round.
    """
    privacy, least = config.privacy, max(LEAST, config.rounds.min_updates)
    if privacy.mechanism != "distributed":
        return least
    return max(least, expected - math.floor(privacy.secure_dropouts * expected))


_STANDARDISE = (
    "model.standardise = true: clients' means and deviations would go into the model without noise, which no "
    "epsilon covers; set model.standardise = false with a privacy.mechanism"
)
_FEDERATED = (
    "evaluate.federated = true: clients' losses, accuracies and counts of examples would be sent without "
    "noise; leave it out with a privacy.mechanism"
)
_LEFT_OUT = (
    "evaluate.leave_one_client_out, evaluate.folds: each further training would spend the same clients' "
    "budget again; leave them out with a privacy.mechanism"
)
_POISSON_COHORT = (
    "rounds.cohort: with rounds.sampling = 'poisson' each client is asked with the probability "
    "rounds.fraction, so the number is not fixed; leave rounds.cohort out"
)
