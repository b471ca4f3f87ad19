"""A consistent copy of the database in one file, while others write, and its way back.

SQLite's online backup, or pg_dump under an exported snapshot. The queue is left out: its messages name
files that only live as long as a round, and a worker that goes on sends its round again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, cast

import sqlalchemy as sa

from fedge.errors import FedgeError, UserError
from fedge_server.registry import schema
from fedge_server.registry.engine import DATABASE, reading, refused
from fedge_server.registry.living import living

DUMP: Final = "fedge.pgdump"  # what a copy of PostgreSQL is called; one of SQLite has the database's name
_QUEUE: Final = ("messages", "contents")
_TABLES: Final = (*schema.metadata.tables, "alembic_version")
_RULES: Final = ("--no-owner", "--no-privileges")


Hold = Callable[[Sequence[str]], None]
"""Told, as soon as the state to copy stands, the digests of the store's objects that it needs."""


def copy_database(engine: sa.Engine, folder: Path, hold: Hold) -> Path:
    """Copy the database into a folder.

    Args:
        engine: of the database; others may write to it.
        folder: gets the file, which its owner alone may read.
        hold: gets what is needed to go on from this very copy, unfinished runs first: they drop objects
            two rounds later, while the copy may still be under way. Of a run it is the last round.

    Raises:
        FedgeError: the database is damaged, cannot be read, or pg_dump fails.
        UserError: pg_dump is not installed.
    """
    if engine.dialect.name == "sqlite":
        return _copy_sqlite(engine, folder / DATABASE, hold)
    return _dump_postgresql(engine, folder / DUMP, hold)


def load_database(engine: sa.Engine, dump: Path) -> None:
    """Fill an empty PostgreSQL database from a copy, wholly or not at all.

    Raises:
        UserError: there are tables of fedge in it, or pg_restore is not installed.
        FedgeError: it cannot be reached, or pg_restore fails.
    """
    with reading(engine) as connection:
        if there := sorted(set(sa.inspect(connection).get_table_names()) & set(_TABLES)):
            raise UserError(
                f"database {_shown(engine)}: holds {there[0]!r}; give an empty one with --database URL"
            )
    _run(engine, "pg_restore", ["--single-transaction", "--exit-on-error", *_RULES, str(dump)])


def _copy_sqlite(engine: sa.Engine, target: Path, hold: Hold) -> Path:
    target.touch(mode=0o600, exist_ok=False)
    try:
        with reading(engine) as connection, closing(sqlite3.connect(target)) as copy:
            hold(
                living(connection, rounds=1)
            )  # this read is the state; the copy below is within its transaction
            live = cast("sqlite3.Connection", connection.connection.driver_connection)
            live.backup(copy)
            if (state := copy.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise FedgeError(f"database {_shown(engine)}: is damaged ({state}); go back to a backup")
            for table in _QUEUE:
                copy.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own
            copy.commit()
            copy.execute("PRAGMA journal_mode=DELETE")  # nothing of it lies in a second file
            copy.execute("VACUUM")
    except (sqlite3.Error, sa.exc.DatabaseError) as error:
        raise FedgeError(f"database {_shown(engine)}: cannot be copied ({str(error)[:200]})") from error
    return target


def _dump_postgresql(engine: sa.Engine, target: Path, hold: Hold) -> Path:
    target.touch(mode=0o600, exist_ok=False)
    tables = [f"--table={name}" for name in _TABLES]
    without = [f"--exclude-table-data={name}" for name in _QUEUE]
    frozen = engine.execution_options(isolation_level="REPEATABLE READ")
    try:
        with frozen.connect() as connection:
            snapshot = connection.scalar(sa.text("SELECT pg_export_snapshot()"))
            options = ["--format=custom", f"--snapshot={snapshot}", f"--file={target}", *_RULES]
            hold(living(connection, rounds=1))
            _run(engine, "pg_dump", [*options, *tables, *without])
    except sa.exc.OperationalError as error:
        raise refused(engine, error) from error
    return target


def _run(engine: sa.Engine, program: str, options: Sequence[str]) -> None:
    """Run a client program of PostgreSQL on the engine's database."""
    known = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)  # Debian's place
    found = shutil.which(program, path=os.pathsep.join([*known, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise UserError(f"{program} is not installed; it comes with PostgreSQL's client programs")
    url = engine.url.set(drivername="postgresql")
    environment = dict(os.environ)
    if url.password is not None:
        environment["PGPASSWORD"] = str(url.password)  # arguments can be read by every user
        url = sa.URL.create(
            "postgresql", url.username, None, url.host, url.port, url.database, query=url.query
        )
    where = f"--dbname={url.render_as_string(hide_password=False)}"
    done = subprocess.run(
        [found, where, *options], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise FedgeError(f"database {_shown(engine)}: {line[:300]}")


def _shown(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
