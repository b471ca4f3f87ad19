"""`train.schedule`: clients train with a rate that falls, and everything else goes on as it did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.state import arrays_of, digest
from fedge_server import strategies
from fedge_server.rounds.rates import learning_rate

COSINE = {"schedule": "cosine"}


def rates(count, **train):
    config = Config.from_mapping({"rounds": {"count": count}, "train": {"learning_rate": 0.4, **train}})
    return [learning_rate(number, config) for number in range(1, count + 1)]


def test_a_constant_rate_stays():
    assert rates(3) == [0.4, 0.4, 0.4]


def test_a_cosine_begins_with_the_whole_rate_and_falls_along_half_a_wave():
    found = rates(8, **COSINE)
    assert found[0] == 0.4
    assert found[4] == pytest.approx(0.2)
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < 0.02
    assert rates(1, **COSINE) == [0.4]


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"momentum": 0.0},  # steps that need no optimiser, and layers that step in their backward pass
        {"momentum": 0.9},
        {"optimizer": "adam", "learning_rate": 0.001},
    ],
)
@pytest.mark.parametrize("model", ["logistic", "cnn"])
def test_batched_clients_are_told_the_rate_of_each_round_as_devices_are(tmp_path, small, learn, model, train):
    ends = {}
    for name, engine, schedule in (
        ("batched", "vector", COSINE),
        ("alone", "sequential", COSINE),
        ("constant", "vector", {}),
    ):
        config = small(
            model={"name": model}, clients={"count": 2}, train={**train, **schedule},
            simulation={"engine": engine}, evaluate={"holdout_fraction": 0.8},
        )  # fmt: skip
        found = learn(config, tmp_path / name)
        ends[name] = np.concatenate([value.ravel() for value in arrays_of(found.model.network).values()])
    apart = np.linalg.norm(ends["batched"] - ends["constant"])
    assert np.linalg.norm(ends["batched"] - ends["alone"]) < 1e-3 * apart


@pytest.mark.slow
def test_a_run_that_goes_on_takes_the_rate_of_its_round(tmp_path, small, learn):
    config = small(rounds={"count": 4}, train=COSINE)
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))


@pytest.mark.parametrize("strategy", ["fedsgd", "qfedavg"])
def test_it_is_refused_where_the_rate_is_not_the_clients_own(small, strategy):
    config, network = small(strategy={"name": strategy}, train={**COSINE, "momentum": 0.9}), nn.Linear(64, 10)
    with pytest.raises(ConfigError, match=r"train\.schedule = 'cosine'"):
        strategies.build(config, network=network)
    strategies.build(replace(config, train=replace(config.train, schedule="constant")), network=network)
