"""What only PostgreSQL does: connections that end while the process lives on, and a shared database."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from fedge.errors import FedgeError
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading, writing


@pytest.fixture
def database_url(postgresql_url: str) -> str:
    return postgresql_url


@pytest.mark.slow
def test_a_registry_goes_on_when_its_connections_were_cut(registry: Registry) -> None:
    """As when the database server has been restarted."""
    registry.queue_run("r", task="digits", seed=0, config={})
    other = sa.create_engine(registry.engine.url, poolclass=sa.NullPool)
    with other.connect() as connection:
        cut = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database()"
        )
        assert connection.scalar(sa.text(f"{cut} AND pid <> pg_backend_pid()")) >= 1
    assert [run["id"] for run in registry.runs()] == ["r"]
    assert registry.queue.attach("r")


@pytest.mark.slow
def test_a_connection_that_is_cut_within_a_transaction_is_our_error_and_changes_nothing(
    registry: Registry,
) -> None:
    registry.queue_run("r", task="digits", seed=0, config={})
    cut = sa.text("SELECT pg_terminate_backend(pg_backend_pid())")

    def write_and_be_cut() -> None:
        with writing(registry.engine) as connection:
            connection.execute(sa.text("UPDATE runs SET status = 'failed'"))
            connection.execute(cut)

    with pytest.raises(FedgeError, match="terminating connection"):
        write_and_be_cut()
    assert registry.runs()[0]["status"] == "queued"


@pytest.mark.slow
def test_a_reader_does_not_wait_for_a_writer_and_the_next_writer_does(registry: Registry) -> None:
    registry.queue_run("r", task="digits", seed=0, config={})
    done = threading.Event()

    def second() -> None:
        registry.count_restart("r")
        done.set()

    thread = threading.Thread(target=second)
    with writing(registry.engine) as connection:
        connection.execute(sa.text("UPDATE runs SET restarts = 5"))
        thread.start()
        assert [run["restarts"] for run in registry.runs()] == [0]
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        with reading(registry.engine) as other:
            while not other.scalar(waiting):
                assert not done.is_set()
    thread.join()
    assert [run["restarts"] for run in registry.runs()] == [6]


@pytest.mark.slow
def test_tables_of_others_in_the_same_database_are_left_alone(tmp_path: Path, database_url: str) -> None:
    other = sa.create_engine(database_url, poolclass=sa.NullPool)
    with other.begin() as connection:
        connection.execute(sa.text("CREATE TABLE theirs (id integer)"))
    with Registry.open(tmp_path, database_url) as registry:
        registry.queue_run("r", task="digits", seed=0, config={})
    with other.connect() as connection:
        assert sa.inspect(connection).has_table("theirs")


@pytest.mark.slow
def test_a_user_who_may_not_make_tables_is_told_so_in_one_line(tmp_path: Path, postgresql_url: str) -> None:
    admin = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
    with admin.begin() as connection:
        connection.execute(sa.text("CREATE ROLE guest LOGIN"))
        connection.execute(sa.text("REVOKE CREATE ON SCHEMA public FROM public"))
    try:
        with pytest.raises(FedgeError, match="permission denied for schema public") as found:
            Registry.open(tmp_path, postgresql_url.replace("fedge@", "guest@"))
        assert "\n" not in str(found.value)
    finally:
        with admin.begin() as connection:
            connection.execute(sa.text("DROP ROLE guest"))


@pytest.mark.slow
def test_a_writer_that_hangs_holds_others_for_a_bounded_time(tmp_path: Path, postgresql_url: str) -> None:
    url = sa.make_url(postgresql_url).update_query_dict({"options": "-c lock_timeout=200ms"}, append=False)
    with Registry.open(tmp_path, url.render_as_string(hide_password=False)) as impatient:
        hung = sa.create_engine(postgresql_url, poolclass=sa.NullPool)
        with hung.begin() as connection:
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(439787743077)"))
            with pytest.raises(FedgeError, match="lock timeout"):
                impatient.queue_run("r", task="digits", seed=0, config={})
        impatient.queue_run("r", task="digits", seed=0, config={})


@pytest.mark.slow
def test_patience_is_set_unless_the_url_says_otherwise(registry: Registry) -> None:
    with reading(registry.engine) as connection:
        assert connection.scalar(sa.text("SHOW lock_timeout")) == "30s"
