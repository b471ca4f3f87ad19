"""What is refused beside a mechanism, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedge.config import Config, override
from fedge.errors import ConfigError
from fedge_server import strategies
from fedge_server.privacy.protection import expected_clients
from fedge_server.privacy.rules import check_model, check_population
from fedge_server.strategies import LINEAR, NAMES, PLAIN

NETWORK = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {"privacy": {"mechanism": "central"}, "model": {"standardise": False}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.from_mapping(values)


def build(made: Config) -> None:
    strategies.build(made, network=NETWORK)


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
        ({"evaluate": {"folds": 5}}, "spend the same clients' budget again"),
        ({"rounds": {"quorum": 0.9}}, "moves the sum by twice privacy.clip_norm"),
        ({"rounds": {"sampling": "poisson", "cohort": 5}}, "leave rounds.cohort out"),
        (
            {"rounds": {"sampling": "poisson"}, "communication": {"codec": ["topk:0.1"]}},
            "communication.error_feedback = true",
        ),
        ({"strategy": {"name": "dp-client-adaptive"}}, "privacy.mechanism = 'central'"),
    ],
)
def test_what_would_make_the_epsilon_wrong_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(config(**sections))


@pytest.mark.parametrize("mechanism", ["local", "example"])
@pytest.mark.parametrize("name", NAMES)
def test_noise_on_the_device_goes_with_every_strategy_that_needs_no_exact_loss(
    mechanism: str, name: str
) -> None:
    made = config(privacy={"mechanism": mechanism}, strategy={"name": name})
    refused = {
        "qfedavg": "exact training loss",
        "fednova": "send their steps besides",
        "scaffold": "send control variates besides",
        "fedasync": "counts one answer of a client in a round",
        "fedbuff": "counts one answer of a client in a round",
        "feddf": "needs proxy data",  # of which there is none here
    }
    if mechanism == "example":
        refused["fedsgd"] = "here the server makes them"
    if name in refused:
        with pytest.raises(ConfigError, match=refused[name]):
            build(made)
    else:
        build(made)


def test_with_noise_on_the_device_a_quorum_is_fine_and_the_server_counts_nothing() -> None:
    build(config(privacy={"mechanism": "local"}, rounds={"quorum": 0.5}))
    with pytest.raises(ConfigError, match="the server counts who is clipped"):
        build(config(privacy={"mechanism": "local", "adaptive_clip": True}))


def test_batch_normalisation_is_refused_where_examples_are_protected() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_model(config(), model)
    with pytest.raises(ConfigError, match="batch normalisation mixes the examples"):
        check_model(config(privacy={"mechanism": "example"}), model)
    check_model(config(privacy={"mechanism": "example"}), nn.Linear(2, 2))


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


def table() -> list[tuple[str, str, str]]:
    """(assignment, mechanism, verdict) for each cell of the table in docs/privacy.md."""
    text = (Path(__file__).parents[3] / "docs" / "privacy.md").read_text("utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(lines) if line[0] == "beside it")
    mechanisms = [cell.strip("`") for cell in lines[start][1:4]]
    return [
        (line[0].strip("`"), mechanism, verdict)
        for line in lines[start + 1 :]
        for mechanism, verdict in zip(mechanisms, line[1:4], strict=True)
    ]


@pytest.mark.parametrize(("assignment", "mechanism", "verdict"), table())
def test_each_cell_of_the_documented_table_is_so(assignment: str, mechanism: str, verdict: str) -> None:
    key, _, value = assignment.partition(" = ")
    plain = {"privacy": {"mechanism": mechanism}, "model": {"standardise": False}}
    made = Config.from_mapping(override(plain, [f"{key}={value}"]))
    if verdict == "allowed":
        build(made)
    else:
        assert verdict == "refused"
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            build(made)


@pytest.mark.parametrize(
    "codec", [{"codec": ["int8"]}, {"codec": ["topk:0.1"], "error_feedback": False}, {"codec": []}]
)
def test_amplification_goes_with_codecs_that_remember_nothing(codec: dict[str, Any]) -> None:
    build(config(rounds={"sampling": "poisson"}, communication=codec))
