"""The privacy report says who could see what, and never that something protects which does not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fedge.config import Config
from fedge_server.privacy.report import PrivacyReport, privacy_report
from fedge_server.rounds.record import Rejected, RoundRecord

CENTRAL = {"privacy": {"mechanism": "central"}, "model": {"standardise": False}}
SECRET = {"epsilon": 3.0, "delta": 1e-5, "clip_norm": 0.5, "noise": "secret"}
RECORDS = [
    RoundRecord(0, {}),
    RoundRecord(1, {}, clients=8, asked=10, rejected=(Rejected(3, "norm"),), privacy=SECRET),
    RoundRecord(2, {}, clients=0, asked=10, counted=False, privacy=SECRET),
    RoundRecord(3, {}, clients=9, asked=10, privacy=SECRET),
]


def report(
    sections: dict[str, Any], *, epsilon: float | None = None, records: Any = RECORDS, **changes: bool
) -> PrivacyReport:
    asked = {"moments": False, "simulated": False} | changes
    return privacy_report(Config.from_mapping(sections), records, epsilon=epsilon, **asked)


def seen_by(found: PrivacyReport) -> list[str]:
    return [viewer.who for viewer in found.viewers if viewer.single_updates]


def test_without_a_mechanism_it_says_plainly_that_updates_give_data_back() -> None:
    found = report({})
    assert not found.protects
    assert (found.epsilon, found.delta, found.ledger) == (None, None, None)
    assert "can see each single one, and an update gives training data back" in found.statements[0]
    assert seen_by(found) == ["hub", "worker", "operator"]
    assert not any(viewer.bounded for viewer in found.viewers)


def test_central_noise_bounds_what_models_show_and_hides_nothing_from_the_server() -> None:
    found = report(CENTRAL, epsilon=3.25)
    assert (found.protects, found.epsilon, found.delta, found.clip_norm) == (True, 3.25, 1e-5, 0.5)
    assert "epsilon 3.25 at delta 1e-05" in found.statements[0]
    assert seen_by(found) == ["hub", "worker", "operator"]
    assert [viewer.who for viewer in found.viewers if viewer.bounded] == [
        "device", "other clients", "whoever has a release"
    ]  # fmt: skip


@pytest.mark.parametrize(("mechanism", "whom"), [("local", "a client"), ("example", "one example")])
def test_noise_on_the_device_bounds_what_the_server_sees_too(mechanism: str, whom: str) -> None:
    found = report({**CENTRAL, "privacy": {"mechanism": mechanism}}, epsilon=3.25)
    assert (found.protects, found.epsilon) == (True, 3.25)
    assert f"about {whom}" in found.statements[0]
    assert "towards hub, worker and operator too" in found.statements[1]
    assert seen_by(found) == []
    assert all(viewer.bounded for viewer in found.viewers)
    hub = next(viewer for viewer in found.viewers if viewer.who == "hub")
    assert ("number of examples" in hub.sees) == (mechanism == "example")
    assert "training loss" not in hub.sees


def test_it_states_the_ledgers_epsilon_and_not_the_last_rounds() -> None:
    """Another run over the same devices has spent since: 3.0 in the record, 7.5 in the ledger."""
    assert report(CENTRAL, epsilon=7.5).epsilon == 7.5


def test_noise_from_a_seed_protects_nobody() -> None:
    seeded = [RoundRecord(1, {}, clients=9, asked=10, privacy={**SECRET, "noise": "seed"})]
    found = report(CENTRAL, epsilon=3.0, records=seeded, simulated=True)
    assert not found.protects
    assert any("it protects nobody" in line for line in found.statements)
    assert "would, by secret noise, be bounded" in found.statements[0]
    assert not any(viewer.bounded for viewer in found.viewers)
    assert any("simulation" in line for line in found.statements)


def test_an_epsilon_without_end_is_none_at_all() -> None:
    found = report(CENTRAL, epsilon=math.inf)
    assert (found.protects, found.epsilon) == (False, None)
    assert found.statements[0].startswith("No epsilon can be stated")
    assert "Infinity" not in json.dumps(found.to_json())
    assert not any(viewer.bounded for viewer in found.viewers)


def test_requests_dropouts_and_the_smallest_aggregate_are_counted() -> None:
    """8 + 0 + 9 of 30 were used; the round that did not count is no aggregate."""
    found = report({"rounds": {"min_updates": 5}})
    assert (found.asked, found.dropouts, found.smallest_round, found.threshold) == (30, 13, 8, 5)
    assert report({}, records=[RoundRecord(0, {})]).smallest_round is None


def test_the_clipped_share_is_read_off_the_noised_step_of_the_clipping_norm() -> None:
    """exp(-0.2 (u - 0.5)) with u = 0.7 unclipped: a share of 0.3 was clipped. Without a count: unknown."""
    step = math.exp(-0.2 * (0.7 - 0.5))
    adaptive = {**CENTRAL, "privacy": {"mechanism": "central", "adaptive_clip": True}}
    records = [RoundRecord(1, {}, clients=9, asked=9, privacy={**SECRET, "next_clip_norm": 0.5 * step})]
    assert report(adaptive, epsilon=3.0, records=records).clipped_share == pytest.approx(0.3, abs=1e-4)
    assert report(CENTRAL, epsilon=3.0).clipped_share is None


def test_moments_and_own_evaluations_are_named_where_they_are_sent() -> None:
    bare, full = report({}), report({"evaluate": {"federated": True}}, moments=True)
    assert len(full.statements) == len(bare.statements) + 2
    for found, expected in ((bare, False), (full, True)):
        hub = next(viewer for viewer in found.viewers if viewer.who == "hub")
        assert ("moments" in hub.sees, "evaluation" in hub.sees) == (expected, expected)


def test_as_json_it_names_whom_clients_must_trust() -> None:
    plain = json.loads(json.dumps(report(CENTRAL, epsilon=3.0).to_json()))
    assert plain["single_updates_seen_by"] == ["hub", "worker", "operator"]
    assert plain["viewers"][0].keys() == {"who", "sees", "single_updates", "bounded"}
    assert "clipped_share" not in plain


def test_a_round_of_one_update_shows_it_to_whoever_has_both_models() -> None:
    alone = [RoundRecord(0, {}), RoundRecord(1, {}, clients=1, asked=4)]
    assert any("made of a single update" in line for line in report({}, records=alone).statements)
    assert not any("made of a single update" in line for line in report({}).statements)
