"""Noise in shares: what a sum holds, what it costs, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.guard import Guard, noised_share
from fedge.noise import derived_key
from fedge.secagg.encoding import EXTRAS, decode_whole, encode_whole
from fedge_server import strategies
from fedge_server.privacy.rules import guard_of_shares, least_of
from fedge_server.rounds.secure import encoding_of

ORIGIN = {"w": np.zeros((40, 50), np.float32), "b": np.zeros(7, np.float32)}
NETWORK = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
SECTIONS = {
    "privacy": {"mechanism": "distributed", "secure_aggregation": True, "secure_corrupt": 0.0},
    "model": {"standardise": False},
    "rounds": {"min_updates": 16},
}


def config(**privacy: object) -> Config:
    return Config.from_mapping({**SECTIONS, "privacy": {**SECTIONS["privacy"], **privacy}})


@pytest.mark.parametrize("answered", [16, 20])
def test_a_sum_of_the_least_clients_holds_the_whole_noise_and_one_of_more_holds_more(answered: int) -> None:
    guard = guard_of_shares(config(clip_norm=2.0, noise_multiplier=1.5), 20)
    assert guard == Guard("distributed", 2.0, 1.5, least=16)
    change = {"w": np.full((40, 50), 10.0, np.float32), "b": np.zeros(7, np.float32)}
    total = np.zeros(2007 + EXTRAS, np.uint32)
    for i in range(answered):
        share = noised_share(change, ORIGIN, guard, derived_key(i), least=guard.least, step=guard.share_step)
        assert max(np.abs(value).max() for value in share.values()) <= guard.largest_share
        total += encode_whole(share.values())
    found = decode_whole(total, guard.share_step, 20)
    assert (found.clients, found.examples) == (answered, answered)
    clipped = 2.0 / np.sqrt(2000)  # each of 2,000 equal values
    assert found.mean[:2000].mean() == pytest.approx(clipped * answered / 20, abs=0.02)
    noise = found.mean[:2000].std() * 20
    assert noise == pytest.approx(3.0 * np.sqrt(answered / 16), rel=0.06)


def test_corrupt_clients_shares_are_not_counted_on() -> None:
    assert guard_of_shares(config(secure_corrupt=0.1), 100).least == 70
    assert guard_of_shares(config(secure_corrupt=0.4, secure_dropouts=0.45), 100).least == 15
    few = Config.from_mapping({**SECTIONS, "rounds": {}})
    assert guard_of_shares(few, 100).least == 80
    assert guard_of_shares(few, 4).least == 4
    assert guard_of_shares(config(), 18).least == 16  # rounds.min_updates


def test_without_shares_of_noise_three_clients_hide_one_another() -> None:
    plain = Config.from_mapping({"privacy": {"secure_aggregation": True}, "rounds": {"min_updates": 2}})
    assert least_of(plain, 100) == 3
    assert least_of(config(), 100) == 80


def test_it_needs_masks_and_a_round_that_nobody_pushes_another_out_of() -> None:
    strategies.build(config(), network=NETWORK)
    with pytest.raises(ConfigError, match=r"set privacy\.secure_aggregation = true"):
        strategies.build(config(secure_aggregation=False), network=NETWORK)
    with pytest.raises(ConfigError, match="pushes another out"):
        strategies.build(Config.from_mapping({**SECTIONS, "rounds": {"quorum": 0.9}}), network=NETWORK)
    with pytest.raises(ConfigError, match="the server counts who is clipped"):
        strategies.build(config(adaptive_clip=True), network=NETWORK)


def test_shares_that_could_overflow_are_refused_before_the_run() -> None:
    encoding_of(config(), 1000)
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier = 1e-05: .* below 2\^31"):
        encoding_of(config(noise_multiplier=1e-5), 1000)
