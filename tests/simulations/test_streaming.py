"""Updates that are added up as they come: the same as from a list, on every Grid, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.errors import RoundError
from fedge.learning.messages import to_record
from fedge.learning.state import arrays_of, digest
from fedge_server import strategies
from fedge_server.strategies import SINGLE_PASS, SUMS
from fedge_simulations.trainers import OneByOne

NAMES = sorted(found.__name__.lower() for found in SINGLE_PASS)
OPTIONS = {
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.5},
    "fedsgd": {"momentum": 0.9},
}
MODELS = {"fedbn": {"name": "mlp-bn"}, "fedper": {"name": "mlp"}}


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "vector"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_gives_what_a_list_gives(name, engine, small, learn, tmp_path, monkeypatch):
    """Both in float64, so that the other order of the list shows in no bit; the scenario spreads arrivals."""
    config = small(
        strategy={"name": name, "accumulate": "float64", **OPTIONS.get(name, {})},
        rounds={"count": 3, "fraction": 0.8},
        scenario={"speed_sigma": 1.0},
        simulation={"engine": engine},
        validate={"max_examples": 10**6},  # looked at one by one: no partial sums
        **({"model": MODELS[name]} if name in MODELS else {}),
    )
    streamed = learn(config, tmp_path / "stream")
    monkeypatch.setattr(strategies, "SINGLE_PASS", frozenset())
    listed = learn(config, tmp_path / "list")
    assert digest(arrays_of(streamed.model.network)) == digest(arrays_of(listed.model.network))
    for one, other in zip(streamed.records, listed.records, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-12)
        assert (one.updates, one.clients, one.bytes_up) == (other.updates, other.clients, other.bytes_up)


def test_whoever_takes_sums_or_is_linear_goes_through_them_once():
    assert strategies.LINEAR <= SUMS <= SINGLE_PASS


def far(_, reply):
    """A client that is far away."""
    record = reply.content.array_records["arrays"]
    reply.content["arrays"] = to_record({k: 100 + v.numpy() for k, v in record.items()}, shared=False)
    return reply


def nan(_, reply):
    record = reply.content.array_records["arrays"]
    last = list(record)[-1]
    arrays = {k: np.full_like(v.numpy(), np.nan) if k == last else v.numpy() for k, v in record.items()}
    reply.content["arrays"] = to_record(arrays, shared=False)
    return reply


def fails(_, reply):
    raise ValueError("no")


@pytest.mark.quick_where(name=("fedadam",))
@pytest.mark.parametrize("name", ["fedavg", "fedadam"])
def test_a_bad_update_in_the_middle_leaves_the_sum_to_the_bit_as_if_it_had_never_come(
    name, small, learn, tmp_path
):
    config = small(strategy={"name": name}, rounds={"count": 2})
    bad = learn(config, tmp_path / "bad", tamper={3: nan})
    absent = learn(config, tmp_path / "absent", tamper={3: fails})
    assert [record.clients for record in bad.records] == [4, 4]
    assert digest(arrays_of(bad.model.network)) == digest(arrays_of(absent.model.network))


@pytest.mark.quick_where(name=("fedadam", "scaffold"))
@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedsgd", "fednova", "scaffold"])
def test_a_round_with_too_few_updates_moves_nothing_that_the_strategy_remembers(name, small, learn, tmp_path):
    options = {"server_momentum": 0.9} if name == "fedavgm" else {}
    few = small(strategy={"name": name, **options}, rounds={"count": 9, "min_updates": 5})
    with pytest.raises(RoundError, match="3 rounds in a row did not count; the last: 1 of 5 rejected"):
        learn(few, tmp_path, tamper={2: nan})
    from fedge_server.registry.database import Registry
    from fedge_server.strategies.state import restore

    with Registry.open(tmp_path) as registry:
        last = registry.last_round("test")
    network = learn(small(rounds={"count": 1}), tmp_path / "other").model.network
    strategy = strategies.build(few, network=network, population=5).strategy
    restore(strategy, last.state)
    kept = {"fedavgm": "momentum_vector", "fedadam": "m_t", "fedsgd": "moments", "scaffold": "control"}
    found = getattr(strategy, kept.get(name, "weights"))
    assert not found or name in ("scaffold", "fednova")
    if name == "scaffold":
        assert all(not value.any() for value in found.values())


@pytest.mark.slow
def test_the_norm_bound_rejects_who_is_out_of_proportion_and_resumes_bit_for_bit(small, learn, tmp_path):
    config = small(rounds={"count": 4}, validate={"max_norm_ratio": 5.0})
    late = {2: lambda sent, reply: far(sent, reply) if _round(sent) > 1 else reply}
    whole = learn(config, tmp_path / "whole", tamper=late)
    assert [record.clients for record in whole.records] == [5, 4, 4, 4]
    for record in whole.records[1:]:
        assert [r.client for r in record.rejected] == [2]
        assert "its change has the norm" in record.rejected[0].reason
    assert all(record.norm > 0 for record in whole.records)
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", tamper=late, stop_after=2)
    resumed = learn(config, tmp_path / "cut", tamper=late)
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))


def _round(message):
    return message.content.config_records["config"]["server-round"]


def test_with_central_noise_a_bound_on_norms_leaves_none_in_the_record(small, learn, tmp_path):
    config = small(
        model={"standardise": False},
        privacy={"mechanism": "central", "accountant": "rdp"},
        validate={"max_norm": 50.0},
        rounds={"count": 2},
    )
    records = learn(config, tmp_path, tamper={2: far}).records
    assert [(record.clients, record.norm) for record in records] == [(4, None), (4, None)]


@pytest.mark.slow
def test_the_order_of_arrival_is_that_of_the_simulated_clock_however_many_train_together(
    small, learn, tmp_path
):
    class Together(OneByOne):
        def at_once(self, job):
            return 3

    config = small(rounds={"count": 2}, scenario={"speed_sigma": 1.0}, validate={"max_norm": 1e6})
    one, many = (
        learn(config, tmp_path / str(k), trainers=trainers)
        for k, trainers in enumerate((OneByOne(), Together()))
    )
    assert without_time(one.records) == without_time(many.records)
    assert one.model_sha256 == many.model_sha256


PEAK = """
import sys, numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from fedge.learning.messages import to_record
from fedge_server.rounds.closing import Collected, collect, singles
from fedge_server.rounds.validation import Rules
from fedge_server.strategies.fedavg import FedAvg
from fedge_simulations.grid import VectorGrid

def client(message, context):
    arrays = {"w": np.full(250_000, context.node_id, np.float32)}
    metrics = MetricRecord({"num-examples": 3, "train_loss": 0.5})
    content = RecordDict({"arrays": to_record(arrays, shared=False), "metrics": metrics})
    return Message(content, reply_to=message)

def peak(clients):
    grid = VectorGrid(client, [{}] * clients, {})
    content = RecordDict({"arrays": to_record({"w": np.zeros(250_000, np.float32)})})
    came = grid.send_and_receive([Message(content, node, "train") for node in grid.get_node_ids()])
    rules = Rules({"w": np.zeros(250_000, np.float32)}, max_norm=1e9, norms=True, read_once=True)
    noted = Collected()
    admit = singles(rules, set(range(1, clients + 1)))
    updates = collect(came, admit, noted, needed=clients, once=True)
    open("/proc/self/clear_refs", "w").write("5")
    arrays, _ = FedAvg().aggregate_train(1, updates)
    assert abs(arrays["w"].numpy()[0] - (clients + 1) / 2) < 1e-3
    assert noted.clients == clients
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

peak(10)
print(peak(10), peak(1000))
"""


@pytest.mark.slow
def test_1000_clients_need_no_more_memory_than_10(tmp_path: Path):
    """Of 1 MB each; the difference is their messages without arrays, some kB each."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=True
    )
    few, many = map(int, done.stdout.split())
    assert many - few < 30e6
