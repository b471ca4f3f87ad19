"""The registry, on SQLite and PostgreSQL alike: a round counts once, when its row is committed."""

from __future__ import annotations

import sqlite3
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sqlalchemy as sa

from fedge.errors import DigestError, FedgeError, RoundError, UserError
from fedge_server.registry import engine
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading
from fedge_server.rounds.record import RoundRecord


@pytest.fixture(autouse=True)
def begun(registry):
    registry.begin_run("r", task="digits", seed=0, config={"task": "digits"}, data="d")


def commit(registry: Registry, number: int, run: str = "r") -> str:
    model = {"w": np.full(3, number, np.float32)}
    return registry.commit_round(run, RoundRecord(number, {"accuracy": 0.5}), model, b"state %d" % number)


def test_the_last_committed_round_comes_back_whole(registry, tmp_path, database_url):
    commit(registry, 0)
    digest = commit(registry, 1)
    with Registry.open(tmp_path, database_url) as again:
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


def test_a_queued_run_is_begun_by_its_worker(registry):
    registry.queue_run("q", task="digits", seed=1, config={"task": "digits"})
    queued = registry.run("q")
    assert (queued["status"], queued["data"], queued["restarts"]) == ("queued", "", 0)
    registry.begin_run("q", task="digits", seed=1, config={"task": "digits"}, data="d")
    assert (registry.run("q")["status"], registry.run("q")["data"]) == ("running", "d")
    with pytest.raises(UserError, match="its data has changed"):
        registry.begin_run("q", task="digits", seed=1, config={"task": "digits"}, data="other")
    with pytest.raises(UserError, match="there is one already"):
        registry.queue_run("q", task="digits", seed=1, config={})


def test_a_run_can_be_asked_to_stop(registry):
    registry.queue_run("q", task="digits", seed=1, config={})
    assert registry.request_stop("q") == "stopped"
    assert registry.request_stop("r") == registry.request_stop("r") == "stopping"
    registry.begin_run("r", task="digits", seed=0, config={"task": "digits"}, data="d")
    assert registry.run("r")["status"] == "stopping"  # a worker that starts meanwhile does not lose it
    registry.end_run("r", "stopped", "asked to stop")
    with pytest.raises(UserError, match="is stopped already"):
        registry.request_stop("r")
    with pytest.raises(UserError, match="there is none"):
        registry.request_stop("nobody")


def test_a_queued_run_is_begun_once_and_never_after_it_was_stopped(registry):
    for name in ("q", "stopped"):
        registry.queue_run(name, task="digits", seed=0, config={})
    assert (registry.begin_queued("q"), registry.begin_queued("q")) == (True, False)
    assert registry.request_stop("q") == "stopping"
    assert registry.request_stop("stopped") == "stopped"
    assert not registry.begin_queued("stopped")
    assert registry.run("stopped")["status"] == "stopped"


def test_a_status_is_one_of_few(registry):
    registry.set_status("r", "failed", "power cut")
    assert (registry.run("r")["status"], registry.run("r")["reason"]) == ("failed", "power cut")
    with pytest.raises(ValueError, match="is no status"):
        registry.set_status("r", "pausing")


def test_restarts_of_a_worker_are_counted(registry):
    assert [registry.count_restart("r") for _ in range(2)] == [1, 2]
    assert registry.count_restart("nobody") == 0
    assert registry.run("nobody") is None


def test_writers_take_turns_between_threads(registry):
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda _: registry.count_restart("r"), range(40)))
    assert sorted(counts) == list(range(1, 41))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "database URL: Could not parse"),
        ("mysql+nothing://x", "database URL: "),
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/none",
            r"database postgresql\+psycopg://me:\*\*\*@.* refused",
        ),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_without_its_password(tmp_path, url, said):
    with pytest.raises(FedgeError, match=said) as found:
        Registry.open(tmp_path, url)
    assert "secret" not in str(found.value)
    assert "\n" not in str(found.value)


def test_a_model_is_committed_without_a_copy_of_it(registry):
    model = {name: np.ones(2**20, np.float32) for name in "abcdefgh"}  # 32 MiB
    tracemalloc.start()
    registry.commit_round("r", RoundRecord(1, {"accuracy": 0.5}), model, b"")
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    last = registry.last_round("r")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last.model["h"].tobytes() == model["h"].tobytes()
    assert written < 2 * 2**20
    assert read < 34 * 2**20  # the model itself


def test_a_folder_that_cannot_be_a_home_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be made"):
        Registry.open(tmp_path / "file")
    for name, content in (("garbage", b"rubbish" * 1000), ("folder", None)):
        home = tmp_path / name
        home.mkdir()
        if content is None:
            (home / "fedge.db").mkdir()
        else:
            (home / "fedge.db").write_bytes(content)
        with pytest.raises(FedgeError, match=r"file is not a database|unable to open"):
            Registry.open(home)


def test_a_pool_without_a_free_connection_is_our_error(tmp_path):
    engine = sa.create_engine(
        f"sqlite:///{tmp_path / 'x.db'}", pool_size=1, max_overflow=0, pool_timeout=0.05
    )
    with reading(engine), pytest.raises(FedgeError, match="database"), reading(engine):
        pass
    engine.dispose()


def test_a_disk_that_takes_no_more_is_not_called_a_damaged_database():
    class Full:
        def execute(self, words: str) -> None:
            raise sqlite3.OperationalError("disk I/O error")  # as SQLite says it where the disk is full

    with pytest.raises(FedgeError, match="disk I/O error; see whether its disk is full"):
        engine._durable_sqlite(Full(), None)
