"""Whole runs whose clients are chosen by data or in turn."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch import nn

from fedge.errors import ConfigError
from fedge.learning.messages import ARRAYS, METRICS, from_record
from fedge.learning.state import arrays_of, digest
from fedge_server import strategies


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["size", "round_robin"])
def test_an_interrupted_run_chooses_the_same(sampling, small, learn, tmp_path):
    config = small(
        clients={"count": 12, "partition": "dirichlet:0.5"},
        rounds={"count": 6, "cohort": 5, "sampling": sampling},
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=3)
    resumed = learn(config, tmp_path / "cut")
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert [_told(r) for r in resumed.records] == [_told(r) for r in whole.records]


@pytest.mark.slow
def test_the_global_model_is_the_plain_mean_of_what_was_drawn_by_size(small, learn, tmp_path):
    sent = {}

    def note(message, reply):
        state = {n: v.astype(np.float64) for n, v in from_record(reply.content[ARRAYS]).items()}
        sent[message.metadata.dst_node_id] = state, reply.content[METRICS]["num-examples"]
        return reply

    config = small(
        clients={"count": 3, "partition": "dirichlet:0.5"},
        rounds={"count": 1, "cohort": 3, "sampling": "size"},
    )
    made = arrays_of(learn(config, tmp_path, tamper=dict.fromkeys((1, 2, 3), note)).model.network)
    sums = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if a + b + c == 3]
    fits = []
    for times in sums:  # how often each was drawn is known to nobody outside: one of ten ways must fit
        if all((node in sent) == (count > 0) for node, count in enumerate(times, start=1)):
            states = [(sent[node][0], count) for node, count in enumerate(times, start=1) if count]
            fits.append(
                all(
                    np.allclose(made[name], sum(s[name] * count for s, count in states) / 3, atol=1e-6)
                    for name in made
                )
            )
    assert sum(fits) == 1
    assert len({examples for _, examples in sent.values()}) > 1


def test_in_turn_all_take_part_and_sums_are_made(small, learn, tmp_path):
    config = small(clients={"count": 6}, rounds={"count": 3, "cohort": 2, "sampling": "round_robin"})
    records = learn(config, tmp_path).records
    assert [record.clients for record in records] == [2, 2, 2]


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"name": "scaffold"}},
        {"strategy": {"name": "fednova"}},
        {"strategy": {"name": "fedmedian"}},
        {"strategy": {"name": "qfedavg"}},
        {"privacy": {"mechanism": "central"}, "model": {"standardise": False}},
        {"privacy": {"secure_aggregation": True}, "model": {"standardise": False}},
        {"rounds": {"fit_work": True, "deadline_s": 3.0}},
    ],
)
def test_what_weighs_clients_in_another_way_is_refused_with_draws_by_size(sections, small):
    rounds = {**sections.pop("rounds", {}), "sampling": "size"}
    with pytest.raises(ConfigError, match=r"rounds\.sampling = 'size'"):
        strategies.build(
            small(rounds=rounds, **sections), network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        )


def _told(record):
    return json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True)
