"""One contract for every strategy by name: it runs, resumes bit for bit, and survives a bad client."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedge.learning.state import arrays_of, digest
from fedge_server.strategies import NAMES

OPTIONS = {
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.5},
    "fedsgd": {"momentum": 0.9},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "krum": {"num_malicious_nodes": 1, "mixing": 0.2},
    "bulyan": {"num_malicious_nodes": 0},
    "fedtrimmedavg": {"mixing": 0.2},
    "ditto": {"pull": 0.5},
    "fedper": {"layers": 2},
    "feddf": {"models": "logistic,mlp", "epochs": 2},
}
WAITING = [name for name in NAMES if name not in ("fedasync", "fedbuff")]  # these: test_asynchronous.py
MODELS = {"fedper": "mlp", "fedbn": "mlp-bn"}  # what they need; else the smallest


def named(name):
    """The sections of a configuration with this strategy."""
    return {
        "strategy": {"name": name, **OPTIONS.get(name, {})},
        "model": {"name": MODELS.get(name, "logistic")},
    }


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.quick_where(name=("fedavg", "fedadam"))
@pytest.mark.parametrize("name", WAITING)
def test_runs_keeps_the_models_form_and_resumes_bit_for_bit(name, small, learn, tmp_path):
    config = small(**named(name), rounds={"count": 4, "fraction": 0.8})
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


@pytest.mark.parametrize("name", WAITING)
def test_a_client_that_sends_nan_is_rejected_and_the_round_goes_on(name, small, learn, tmp_path):
    def nan(_, reply):
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {k: Array(np.full_like(v.numpy(), np.nan)) for k, v in record.items()}
        )
        return reply

    config = small(**named(name), rounds={"count": 2})
    learned = learn(config, tmp_path, tamper={2: nan})
    for record in learned.records:
        assert record.clients == 4
        assert [(r.client, "NaN" in r.reason) for r in record.rejected] == [(2, True)]
    assert all(np.isfinite(value).all() for value in arrays_of(learned.model.network).values())


@pytest.mark.quick_where(name=("bulyan",))
@pytest.mark.parametrize("name", ["fedavg", "qfedavg", "bulyan"])
def test_the_digest_of_updates_is_of_what_the_clients_sent(name, small, learn, tmp_path):
    """Some strategies empty or change the messages; the same updates must give the same digest."""
    alone = {"engine": "sequential"}  # no sums, which have a digest of their own
    config = small(strategy={"name": name, **OPTIONS.get(name, {})}, rounds={"count": 1}, simulation=alone)
    plain = small(rounds={"count": 1}, simulation=alone)
    digests = [learn(c, tmp_path / str(i)).records[0].updates for i, c in enumerate((config, plain))]
    assert digests[0] == digests[1]
    other = small(rounds={"count": 1}, seed=1)
    assert learn(other, tmp_path / "other").records[0].updates != digests[0]


@pytest.mark.slow
def test_a_deadline_means_the_same_after_a_resume(small, learn, tmp_path):
    settings = {"rounds": {"count": 5, "deadline_s": 0.28}, "scenario": {"speed_sigma": 0.5}}
    whole = learn(small(**settings), tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(small(**settings), tmp_path / "cut", stop_after=1)
    assert without_time(learn(small(**settings), tmp_path / "cut").records) == without_time(whole.records)


def test_one_client_with_an_absurd_but_well_formed_update_does_not_end_the_run(small, learn, tmp_path):
    def huge(_, reply):
        record = reply.content.array_records["arrays"]
        arrays = {k: Array(np.full_like(v.numpy(), 3e18)) for k, v in record.items()}
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    learned = learn(small(rounds={"count": 2}), tmp_path, tamper={2: huge})
    assert [record.round for record in learned.records] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_a_server_steps_parameters_and_takes_the_mean_of_running_statistics(name, small, learn, tmp_path):
    """Momentum carries a running variance below 0, and the model answers with NaN from then on."""
    sent: list[dict[str, np.ndarray]] = []

    def look(_, reply):
        sent.append({n: a.numpy().copy() for n, a in reply.content.array_records["arrays"].items()})
        return reply

    alone = {"engine": "sequential"}
    config = small(
        strategy={"name": name, **OPTIONS.get(name, {})},
        model={"name": "mlp-bn"},
        rounds={"count": 2},
        clients={"count": 3, "partition": "iid"},
        simulation=alone,
    )
    learned = learn(config, tmp_path, tamper=dict.fromkeys(range(1, 4), look))
    assert [record.clients for record in learned.records] == [3, 3]
    after, last = arrays_of(learned.model.network), sent[-3:]
    lowest = {name: np.min([each[name] for each in last], axis=0) - 1e-6 for name in after}
    highest = {name: np.max([each[name] for each in last], axis=0) + 1e-6 for name in after}
    between = {
        name: ((lowest[name] <= value) & (value <= highest[name])).all() for name, value in after.items()
    }
    assert all(found for name, found in between.items() if "running" in name)
    assert not any(found for name, found in between.items() if name.startswith("0.weight"))  # its own step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_round_whose_model_answers_nonsense_leaves_nothing_in_the_servers_moments(
    name, small, learn, tmp_path
):
    """The variance of one client is finite and absurd: the mean has no root, and the round does not count."""
    asked: list[int] = []

    def absurd(_, reply):
        asked.append(len(asked) + 1)
        arrays = {n: a.numpy() for n, a in reply.content.array_records["arrays"].items()}
        if asked[-1] == 2:
            arrays |= {n: np.full_like(v, -1e6) for n, v in arrays.items() if "running_var" in n}
            arrays |= {n: v + 10 for n, v in arrays.items() if "running" not in n}
        reply.content["arrays"] = ArrayRecord({n: Array(v) for n, v in arrays.items()})
        return reply

    section = {**named(name), "model": {"name": "mlp-bn"}}
    learned = learn(small(**section, rounds={"count": 4}), tmp_path, tamper={2: absurd})
    assert [record.counted for record in learned.records] == [True, False, True, True]
    assert learned.records[2].metrics["loss"] < 2 * learned.records[0].metrics["loss"]


def test_every_strategy_of_flower_but_trees_and_wrappers_has_a_name():
    from flwr.serverapp import strategy as flower

    left_out = ("Result", "Strategy"), ("Xgb", "DifferentialPrivacy")  # [privacy] takes the latter's place
    wanted = {n for n in flower.__all__ if n not in left_out[0] and not any(w in n for w in left_out[1])}
    ours = {
        "fedsgd",
        "fednova",
        "scaffold",
        "fedper",
        "fedbn",
        "ditto",
        "feddf",
        "geometricmedian",
        "centredclipping",
        "fedasync",
        "fedbuff",
    }
    assert {name.lower() for name in wanted} == set(NAMES) - ours


@pytest.mark.quick_where(name=("fedavg",))
@pytest.mark.parametrize(
    "name", ["fedavg", "fedadam", "fedyogi", "fedprox", "fedsgd", "fedmedian", "qfedavg"]
)
def test_it_learns_digits(name, small, learn, tmp_path):
    options = {"fedsgd": {"learning_rate": 0.5}, "fedprox": {"proximal_mu": 0.01}}.get(name, {})
    config = small(strategy={"name": name, **options}, rounds={"count": 16}, train={"epochs": 1})
    records = learn(config, tmp_path).records
    assert records[-1].metrics["accuracy"] > (0.6 if name == "qfedavg" else 0.8)  # it takes careful steps


def test_a_strategy_without_metrics_still_counts(small, learn, tmp_path, monkeypatch):
    from fedge_server.strategies.fedavg import FedAvg

    plain = FedAvg.aggregate_train
    monkeypatch.setattr(FedAvg, "aggregate_train", lambda *arguments: (plain(*arguments)[0], None))
    records = learn(small(rounds={"count": 2}), tmp_path).records
    assert [(record.counted, record.clients) for record in records] == [(True, 5), (True, 5)]
