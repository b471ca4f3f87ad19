"""What is refused beside a mechanism, and why."""

from __future__ import annotations

from typing import Any

import pytest

from fedge.config import Config
from fedge.errors import ConfigError
from fedge_server import strategies
from fedge_server.privacy.protection import expected_clients
from fedge_server.privacy.rules import check_population
from fedge_server.strategies import LINEAR, NAMES, PLAIN


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {"privacy": {"mechanism": "central"}, "model": {"standardise": False}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.from_mapping(values)


def build(made: Config) -> None:
    strategies.build(made, parameter_names=("w",))


@pytest.mark.parametrize("name", NAMES)
def test_noise_on_a_sum_goes_with_every_linear_strategy_and_no_other(name: str) -> None:
    made = config(strategy={"name": name})
    if PLAIN[name] in LINEAR:
        build(made)
    else:
        with pytest.raises(ConfigError, match="looks at single updates"):
            build(made)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"standardise": True}}, "means and deviations would go into the model without noise"),
        ({"evaluate": {"federated": True}}, "sent without noise"),
        ({"evaluate": {"leave_one_client_out": True}}, "spend the same clients' budget again"),
        ({"rounds": {"quorum": 0.9}}, "moves the sum by twice privacy.clip_norm"),
        ({"rounds": {"sampling": "poisson", "cohort": 5}}, "leave rounds.cohort out"),
        ({"strategy": {"name": "dp-client-adaptive"}}, "privacy.mechanism = 'central'"),
    ],
)
def test_what_would_make_the_epsilon_wrong_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(config(**sections))


def test_a_deadline_and_poisson_sampling_are_fine() -> None:
    build(config(rounds={"deadline_s": 60.0, "sampling": "poisson", "fraction": 0.1}))


def test_delta_must_be_below_one_client_in_all() -> None:
    check_population(config(), 100, 100)
    with pytest.raises(ConfigError, match=r"with 100000 clients it must be below 1e-05"):
        check_population(config(), 100, 100_000)


def test_a_count_with_too_little_noise_is_refused() -> None:
    made = config(privacy={"adaptive_clip": True})
    check_population(made, 11, 11)  # sigma 11 / 20 = .55, above z / 2 = .5
    with pytest.raises(ConfigError, match=r"the count's noise 0\.5 must be above 0\.5; raise"):
        check_population(made, 10, 10)


def test_the_denominator_is_fixed_before_anybody_is_asked() -> None:
    assert expected_clients(config(rounds={"fraction": 0.1}), 1000) == 100
    assert expected_clients(config(rounds={"cohort": 30}), None) == 30
    assert expected_clients(config(clients={"count": 50}, rounds={"fraction": 0.5}), None) == 25
    with pytest.raises(ConfigError, match=r"set clients\.count, or rounds\.cohort"):
        expected_clients(config(), None)
