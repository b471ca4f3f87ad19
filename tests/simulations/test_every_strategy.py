"""One contract for every strategy by name: it runs, resumes bit for bit, and survives a bad client."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedge.learning.state import arrays_of, digest
from fedge_server.strategies import NAMES, options_of

OPTIONS = {
    "dp-server-fixed": {"noise_multiplier": 0.01, "clipping_norm": 5.0},
    "dp-client-fixed": {"noise_multiplier": 0.01, "clipping_norm": 5.0},
    "dp-server-adaptive": {"noise_multiplier": 0.01},
    "dp-client-adaptive": {"noise_multiplier": 0.01},
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.5},
    "fedsgd": {"momentum": 0.9},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "krum": {"num_malicious_nodes": 1},
    "bulyan": {"num_malicious_nodes": 0},
}


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.parametrize("name", NAMES)
def test_runs_keeps_the_models_form_and_resumes_bit_for_bit(name, small, learn, tmp_path):
    config = small(strategy={"name": name, **OPTIONS.get(name, {})}, rounds={"count": 4, "fraction": 0.8})
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert [record.round for record in whole.records] == [1, 2, 3, 4]
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert resumed.model_sha256 == whole.model_sha256
    for value in arrays_of(whole.model.network).values():
        assert value.dtype == np.float32
        assert np.isfinite(value).all()
    assert all(record.clients == 4 for record in whole.records)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("dp-")])
def test_a_client_that_sends_nan_is_rejected_and_the_round_goes_on(name, small, learn, tmp_path):
    def nan(_, reply):
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {k: Array(np.full_like(v.numpy(), np.nan)) for k, v in record.items()}
        )
        return reply

    config = small(strategy={"name": name, **OPTIONS.get(name, {})}, rounds={"count": 2})
    learned = learn(config, tmp_path, tamper={2: nan})
    for record in learned.records:
        assert record.clients == 4
        assert [(r.client, "NaN" in r.reason) for r in record.rejected] == [(2, True)]
    assert all(np.isfinite(value).all() for value in arrays_of(learned.model.network).values())


def test_every_strategy_of_flower_but_the_tree_ones_has_a_name():
    from flwr.serverapp import strategy as flower

    wanted = {n for n in flower.__all__ if n not in ("Result", "Strategy") and "Xgb" not in n}
    assert len(NAMES) == len(wanted) + 1  # and fedsgd of our own
    assert all(options_of(name) is not None for name in NAMES)


@pytest.mark.parametrize(
    "name", ["fedavg", "fedadam", "fedyogi", "fedprox", "fedsgd", "fedmedian", "qfedavg"]
)
def test_it_learns_digits(name, small, learn, tmp_path):
    options = {"fedsgd": {"learning_rate": 0.5}, "fedprox": {"proximal_mu": 0.01}}.get(name, {})
    config = small(strategy={"name": name, **options}, rounds={"count": 8}, train={"epochs": 2})
    records = learn(config, tmp_path).records
    assert records[-1].metrics["accuracy"] > (0.6 if name == "qfedavg" else 0.8)  # it takes careful steps
