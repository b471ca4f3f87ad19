"""Rounds under masks in a simulation: the same model as without, drop-outs, and what an abort leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message

from fedge.errors import RoundError
from fedge.learning.messages import ARRAYS, from_record
from fedge.secagg import wire
from fedge.wire.arrays import records_of
from fedge_server.rounds import run as rounds_run
from fedge_simulations import run
from fedge_simulations.grid import VectorGrid

SECTIONS: dict[str, Any] = {
    "task": "digits",
    "seed": 3,
    "model": {"standardise": False, "name": "logistic"},
    "clients": {"count": 8},
    "rounds": {"count": 2},
    "train": {"learning_rate": 0.001},
    "privacy": {"secure_aggregation": True, "secure_range": 100.0},
}


def weights(result: Any) -> np.ndarray:
    return np.concatenate([v.detach().numpy().ravel() for v in result.model.network.state_dict().values()])


@pytest.mark.quick_where(strategy=("fedavg",))
@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_the_model_is_that_of_plain_rounds_within_the_stated_error(strategy: str) -> None:
    sections = {**SECTIONS, "strategy": {"name": strategy}}
    if strategy == "fedsgd":
        sections["train"] = {}
    plain, secure = run({**sections, "privacy": {}}), run(sections)
    bound = sum(float(record.privacy["secure_error"]) for record in secure.history)
    assert 0 < bound < 1e-4
    # After the first round training itself starts from models that differ by the bound.
    assert np.abs(weights(plain) - weights(secure)).max() <= 5 * bound + 1e-6
    assert [record.clients for record in secure.history] == [8, 8]
    assert secure.history[0].train_loss == pytest.approx(plain.history[0].train_loss, abs=1e-3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits() -> None:
    assert np.array_equal(weights(run(SECTIONS)), weights(run(SECTIONS)))


@pytest.mark.slow
def test_drop_outs_in_every_phase_cost_their_clients_alone() -> None:
    lossy = {**SECTIONS, "clients": {"count": 30}, "scenario": {"dropouts": 0.03}, "rounds": {"count": 3}}
    found = run(lossy)
    assert all(record.counted for record in found.history)
    assert sum(record.failures for record in found.history) > 3
    for record in found.history:
        assert record.privacy["secure_lost"] == record.asked - record.clients
        assert {rejected.reason for rejected in record.rejected} == {"client error: dropped out"}


@pytest.mark.slow
def test_beyond_the_threshold_no_round_counts_and_the_reason_is_told() -> None:
    with pytest.raises(RoundError, match=r"secure aggregation: .* needed"):
        run({**SECTIONS, "scenario": {"dropouts": 0.7}})


@pytest.mark.slow
def test_a_round_that_asks_nobody_says_nothing_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(grid: Any, nodes: Any, share: float, *, seed: int, number: int) -> list[int]:
        return [] if number == 2 else list(nodes)[: 2 if number == 3 else 8]

    monkeypatch.setattr(rounds_run, "draw_each", drawn)
    found = run({**SECTIONS, "rounds": {"count": 4, "sampling": "poisson", "fraction": 0.9}})
    said = [sorted(record.privacy) for record in found.history]
    assert [record.counted for record in found.history] == [True, False, False, True]
    assert said[1:3] == [[], ["aborted", "secure_least"]]
    assert said[0] == said[3]
    assert "secure_lost" in said[0]


@pytest.mark.slow
def test_dp_sgd_goes_under_masks() -> None:
    privacy = {**SECTIONS["privacy"], "mechanism": "example", "min_examples": 64, "delta": 1e-4}
    found = run({**SECTIONS, "privacy": privacy, "rounds": {"count": 1}})
    assert found.history[0].clients == 8
    assert found.history[0].privacy["epsilon"] > 0


@pytest.mark.slow
def test_distributed_noise_is_spent_and_ends_at_the_budget() -> None:
    privacy = {
        "secure_aggregation": True,
        "secure_corrupt": 0.0,
        "mechanism": "distributed",
        "noise_multiplier": 8.0,
        "delta": 1e-3,
        "max_epsilon": 0.7,
    }
    found = run({**SECTIONS, "privacy": privacy, "rounds": {"count": 50, "min_updates": 8}})
    spent = [float(record.privacy["epsilon"]) for record in found.history]
    assert 1 < len(spent) < 50
    assert spent == sorted(spent)
    assert spent[-1] <= 0.7
    assert [record.clients for record in found.history] == [8] * len(spent)
    assert "privacy.max_epsilon" in found.summary["stopped"]


@pytest.mark.slow
def test_what_travels_is_noise_of_the_models_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Message] = []
    deliver = VectorGrid._deliver

    def spied(self: VectorGrid, item: Any) -> Message:
        reply = deliver(self, item)
        if item.message.metadata.message_type == "train":
            seen.append(reply)
        return reply

    monkeypatch.setattr(VectorGrid, "_deliver", spied)
    found = run({**SECTIONS, "rounds": {"count": 1}})
    assert len(seen) == 8
    for reply in seen:
        (words,) = from_record(records_of(reply.content, ArrayRecord)[ARRAYS]).values()
        assert words.dtype == np.uint32
        assert len(words) == weights(found).size + 4
        assert abs(float(words.mean()) / 2**32 - 0.5) < 0.08
        assert set(reply.content) == {ARRAYS, "metrics"}


@pytest.mark.quick_where(kind=(wire.UNMASK,))
@pytest.mark.parametrize(
    ("kind", "record", "says"),
    [
        (wire.KEYS, {"keys": b"short"}, "cannot be read"),
        (wire.SHARES, {"boxes": b"", "own": b""}, "cannot be read"),
        (wire.CHECK, {"good": (99).to_bytes(8, "little")}, "was not sent"),
        (wire.UNMASK, {"seeds": bytes(32), "keys": b""}, "cannot be read"),
    ],
)
def test_a_malformed_answer_costs_its_client_alone(
    kind: str, record: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = VectorGrid._deliver

    def spoilt(self: VectorGrid, item: Any) -> Message:
        reply = deliver(self, item)
        metadata = item.message.metadata
        return (
            wire.reply(item.message, **record)
            if (metadata.message_type, metadata.dst_node_id) == (kind, 2)
            else reply
        )

    monkeypatch.setattr(VectorGrid, "_deliver", spoilt)
    found = run({**SECTIONS, "rounds": {"count": 1}}).history[0]
    assert found.counted
    assert [rejected.client for rejected in found.rejected] == [2]
    assert says in found.rejected[0].reason
