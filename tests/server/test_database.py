"""The registry: a round counts once, when its row is committed."""

from __future__ import annotations

import numpy as np
import pytest
import sqlalchemy as sa

from fedge.errors import DigestError, FedgeError, RoundError, UserError
from fedge_server.registry.database import Registry
from fedge_server.rounds.record import RoundRecord


@pytest.fixture
def registry(tmp_path):
    with Registry.open(tmp_path) as opened:
        opened.begin_run("r", task="digits", seed=0, config={"task": "digits"}, data="d")
        yield opened


def commit(registry: Registry, number: int, run: str = "r") -> str:
    model = {"w": np.full(3, number, np.float32)}
    return registry.commit_round(run, RoundRecord(number, {"accuracy": 0.5}), model, b"state %d" % number)


def test_the_last_committed_round_comes_back_whole(registry, tmp_path):
    commit(registry, 0)
    digest = commit(registry, 1)
    with Registry.open(tmp_path) as again:
        last = again.last_round("r")
        assert again.records("r") == [RoundRecord(0, {"accuracy": 0.5}), RoundRecord(1, {"accuracy": 0.5})]
    assert (last.record.round, last.model_sha256, last.state) == (1, digest, b"state 1")
    assert last.model["w"].tolist() == [1, 1, 1]


def test_a_round_is_never_counted_twice(registry):
    commit(registry, 1)
    with pytest.raises(RoundError, match="round 1 is committed already"):
        commit(registry, 1)


def test_bytes_of_old_rounds_go_but_their_records_stay(registry):
    digests = [commit(registry, number) for number in range(4)]
    assert [registry.store.has(digest) for digest in digests] == [False, False, True, True]
    assert len(registry.records("r")) == 4


def test_bytes_that_another_run_or_a_release_names_are_kept(registry):
    registry.begin_run("other", task="digits", seed=0, config={}, data="d")
    shared = commit(registry, 0)
    commit(registry, 0, run="other")
    released = commit(registry, 1)
    registry.record_release(
        version=1, run_id="r", round_number=1, global_model=released, manifest=b"{}", variants=[]
    )
    for number in (2, 3, 4):
        commit(registry, number)
    assert registry.store.has(shared)
    assert registry.store.has(released)


def test_a_damaged_model_is_noticed(registry):
    digest = commit(registry, 0)
    registry.store.path(digest).write_bytes(b"rubbish")
    with pytest.raises(DigestError, match="is damaged"):
        registry.last_round("r")


def test_a_database_of_a_newer_fedge_is_refused(tmp_path):
    Registry.open(tmp_path).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'fedge.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0099'"))
    engine.dispose()
    with pytest.raises(FedgeError, match="schema 0099, but this fedge reads up to 0002"):
        Registry.open(tmp_path)


def test_a_run_can_be_begun_again(registry):
    registry.end_run("r", "failed", "power cut")
    registry.begin_run("r", task="digits", seed=0, config={"task": "digits"}, data="d")
    assert [(run["id"], run["status"], run["reason"]) for run in registry.runs()] == [("r", "running", "")]


@pytest.mark.parametrize("changed", [{"config": {"task": "images"}}, {"data": "other"}])
def test_a_run_does_not_go_on_with_other_settings_or_data(registry, changed):
    with pytest.raises(UserError, match="has changed since it began"):
        registry.begin_run(
            "r", **{"task": "digits", "seed": 0, "config": {"task": "digits"}, "data": "d", **changed}
        )
