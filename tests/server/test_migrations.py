"""The database's history: what old homes hold is kept, and what is newer than us is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from fedge import tensors
from fedge.errors import FedgeError
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import connect, reading, writing
from fedge_server.registry.store import ContentStore
from fedge_server.registry.upgrade import FOLDER, run_migrations
from fedge_server.rounds.record import RoundRecord

# What the first release wrote, word for word.
FIRST_SCHEMA = """
CREATE TABLE about (schema_version INTEGER NOT NULL, PRIMARY KEY (schema_version));
CREATE TABLE runs (
    id VARCHAR(64) NOT NULL, task VARCHAR(255) NOT NULL, seed BIGINT NOT NULL, config JSON NOT NULL,
    data VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL, reason TEXT NOT NULL,
    created VARCHAR(32) NOT NULL, PRIMARY KEY (id));
CREATE TABLE rounds (
    run_id VARCHAR(64) NOT NULL, number INTEGER NOT NULL, record JSON NOT NULL, model VARCHAR(64) NOT NULL,
    state VARCHAR(64) NOT NULL, committed VARCHAR(32) NOT NULL, PRIMARY KEY (run_id, number),
    FOREIGN KEY(run_id) REFERENCES runs (id));
CREATE TABLE releases (
    version INTEGER NOT NULL, run_id VARCHAR(64) NOT NULL, round INTEGER NOT NULL,
    global_model VARCHAR(64) NOT NULL, manifest VARCHAR(64) NOT NULL, created VARCHAR(32) NOT NULL,
    PRIMARY KEY (version), FOREIGN KEY(run_id) REFERENCES runs (id));
CREATE TABLE variants (
    release INTEGER NOT NULL, tier VARCHAR(32) NOT NULL, recipe VARCHAR(255) NOT NULL,
    wire VARCHAR(64) NOT NULL, installed VARCHAR(64) NOT NULL, evidence VARCHAR(64) NOT NULL,
    PRIMARY KEY (release, tier), FOREIGN KEY(release) REFERENCES releases (version));
INSERT INTO about VALUES (1);
"""
RECORD = RoundRecord(1, {"accuracy": 0.5, "loss": 1.5}, clients=3, asked=4, updates="u" * 64)


@pytest.fixture
def quick_databases() -> None:
    """Here databases are made and upgraded by the very migrations."""


@pytest.fixture
def engine(tmp_path: Path, database_url: str | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def old(tmp_path: Path, engine: sa.Engine) -> str:
    """A home of the first release with a run, its round and a release; returns the model's digest."""
    store = ContentStore(tmp_path / "store")
    model = store.put(tensors.dump({"w": np.arange(3, dtype=np.float32)}))
    state = store.put(b"state")
    with writing(engine) as connection:
        for statement in filter(str.strip, FIRST_SCHEMA.split(";")):
            connection.exec_driver_sql(statement)
        insert = sa.text(
            "INSERT INTO runs VALUES ('r', 'digits', 7, :config, 'd', 'done', 'all rounds', '2026-01-31')"
        )
        connection.execute(insert, {"config": json.dumps({"task": "digits"})})
        insert = sa.text("INSERT INTO rounds VALUES ('r', 1, :record, :model, :state, '2026-01-31')")
        values = {"record": json.dumps(RECORD.to_json()), "model": model, "state": state}
        connection.execute(insert, values)
        insert = sa.text("INSERT INTO releases VALUES (1, 'r', 1, :model, :manifest, '2026-01-31')")
        connection.execute(insert, {"model": model, "manifest": "m" * 64})
        insert = sa.text("INSERT INTO variants VALUES (1, 'micro', 'int8', :d, :d, :d)")
        connection.execute(insert, {"d": "v" * 64})
    return model


def test_the_schema_is_what_the_migrations_make(
    tmp_path: Path, database_url: str | None, engine: sa.Engine
) -> None:
    Registry.open(tmp_path, database_url).close()
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_an_old_home_is_upgraded_and_loses_nothing(
    tmp_path: Path, database_url: str | None, old: str, engine: sa.Engine
) -> None:
    for _ in range(2):
        with Registry.open(tmp_path, database_url) as registry:
            (run,) = registry.runs()
            assert (run["id"], run["seed"], run["config"]) == ("r", 7, {"task": "digits"})
            assert (run["status"], run["reason"], run["late"], run["session"]) == (
                "done",
                "all rounds",
                0,
                "",
            )
            assert registry.records("r") == [RECORD]
            last = registry.last_round("r")
            assert last is not None
            assert (last.model["w"].tolist(), last.model_sha256, last.state) == ([0, 1, 2], old, b"state")
            assert [release["global_model"] for release in registry.releases()] == [old]
            registry.begin_run("r", task="digits", seed=7, config={"task": "digits"}, data="d")
            registry.end_run("r", "done", "all rounds")
            assert registry.queue.open_messages() == []
    with reading(engine) as connection:
        assert not sa.inspect(connection).has_table("about")
        assert connection.scalar(sa.text("SELECT count(*) FROM variants")) == 1
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema.metadata) == []


def test_an_upgrade_that_breaks_off_leaves_the_old_schema(
    tmp_path: Path, database_url: str | None, old: str, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", killed)  # in a later step than the first
        with pytest.raises(KeyboardInterrupt):
            Registry.open(tmp_path, database_url)
    with reading(engine) as connection:
        tables = set(sa.inspect(connection).get_table_names())
    assert tables == {"about", "runs", "rounds", "releases", "variants"}
    with Registry.open(tmp_path, database_url) as registry:
        assert registry.records("r") == [RECORD]


@pytest.mark.parametrize("written", ["UPDATE alembic_version SET version_num = '9999'", None])
def test_a_database_of_a_newer_fedge_is_refused_and_left_alone(
    tmp_path: Path, database_url: str | None, engine: sa.Engine, written: str | None
) -> None:
    Registry.open(tmp_path, database_url).close()
    with writing(engine) as connection:
        if written:
            connection.exec_driver_sql(written)
        else:
            connection.exec_driver_sql("DELETE FROM alembic_version")
    with pytest.raises(
        FedgeError, match=f"this fedge reads up to {schema.HEAD}; install the fedge that wrote it"
    ):
        Registry.open(tmp_path, database_url)


def test_the_first_schema_of_the_old_way_is_the_first_revision(engine: sa.Engine, old: str) -> None:
    """`FIRST_SCHEMA` and revision 0001 name the same columns."""

    def columns() -> dict[str, set[str]]:
        with reading(engine) as connection:
            inspector = sa.inspect(connection)
            return {
                table: {f"{column['name']} {column['nullable']}" for column in inspector.get_columns(table)}
                for table in inspector.get_table_names()
                if table != "alembic_version"
            }

    before = columns()
    with writing(engine) as connection:
        for table in ("about", "variants", "releases", "rounds", "runs"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        run_migrations(connection, "", "0001")
    assert columns() == before


def test_the_revisions_are_those_that_the_registry_knows() -> None:
    scripts = ScriptDirectory(str(FOLDER), version_locations=[str(FOLDER)])
    assert scripts.get_current_head() == schema.HEAD
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == schema.REVISIONS


@pytest.mark.slow
def test_processes_that_open_a_new_home_at_once_all_get_in(tmp_path: Path, database_url: str | None) -> None:
    script = (
        "import sys; from pathlib import Path; from fedge_server.registry.database import Registry\n"
        "sys.stdin.readline()\n"
        "with Registry.open(Path(sys.argv[1]), sys.argv[2] or None) as r: r.queue_run(sys.argv[3], task='t',"
        " seed=0, config={})"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "home"), database_url or "", f"run-{number}"],
            stdin=subprocess.PIPE,
        )
        for number in range(5)
    ]
    for process in started:
        process.stdin.write(b"go\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    for process in started:
        process.communicate()
    assert [process.returncode for process in started] == [0] * 5
    with Registry.open(tmp_path / "home", database_url) as registry:
        assert len(registry.runs()) == 5
