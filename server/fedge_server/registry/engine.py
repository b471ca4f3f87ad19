"""Connections to SQLite or PostgreSQL, and transactions that behave alike on both: writers take turns."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import FedgeError, UserError

DATABASE: Final = "fedge.db"  # in the home folder, unless a URL is given
_CAUSED_BY_US: Final = (sa.exc.IntegrityError, sa.exc.ProgrammingError, sa.exc.DataError)
_REFUSALS: Final = (sa.exc.DBAPIError, sa.exc.TimeoutError)  # the latter: no connection became free
_WRITES: Final = "fedge_writes"
_WRITERS_KEY: Final = 0x6665646765  # PostgreSQL's advisory lock that writers of fedge take
# Of PostgreSQL's client library: a server that is cut off, or a writer that hangs, must not hold the hub.
_PATIENCE: Final = {
    "connect_timeout": 10,  # seconds
    "tcp_user_timeout": 20_000,  # milliseconds until bytes that nobody confirms end a connection
    "keepalives_idle": 20,  # seconds
    "options": "-c lock_timeout=30s -c idle_in_transaction_session_timeout=60s",
}


def connect(home: Path, url: str | None = None) -> sa.Engine:
    """An engine for the database of a home folder, or for the one at an SQLAlchemy URL.

    Raises:
        UserError: the URL is none, or its driver is not installed.
    """
    try:
        where = sa.make_url(url or f"sqlite:///{home / DATABASE}")
        # What a URL names itself is the user's choice.
        patience = {key: value for key, value in _PATIENCE.items() if key not in where.query}
        arguments = patience if where.get_backend_name() == "postgresql" else {}
        engine = sa.create_engine(where, pool_pre_ping=bool(url), connect_args=arguments)
    except (sa.exc.ArgumentError, ImportError) as error:
        raise UserError(
            f"database URL: {error}; give postgresql+psycopg://USER@HOST/NAME, and install fedge[postgresql]"
        ) from error
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _durable_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name != "postgresql":
        raise UserError(f"database URL: {engine.dialect.name} is not served; use SQLite or PostgreSQL")
    return engine


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One transaction that no other writer overlaps, in this process or another: reading first is safe.

    Raises:
        FedgeError: the database refuses it: the disk is full, the server is gone, or it stayed locked.
    """
    try:
        with engine.execution_options(**{_WRITES: True}).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITERS_KEY)))
            yield connection
    except _CAUSED_BY_US:
        raise
    except _REFUSALS as error:
        raise refused(engine, error) from error


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """One transaction that only reads.

    Raises:
        FedgeError: the database refuses it.
    """
    try:
        with engine.connect() as connection:
            yield connection
    except _CAUSED_BY_US:
        raise
    except _REFUSALS as error:
        raise refused(engine, error) from error


@contextmanager
def opening(home: Path) -> Iterator[None]:
    """One process at a time makes or upgrades the SQLite database of a home; the lock dies with it.

    Raises:
        FedgeError: the folder cannot be written.
    """
    path = home / f"{DATABASE}.lock"
    try:
        lock = path.open("a")
    except OSError as error:
        raise FedgeError(f"database: {path} cannot be written ({error.strerror})") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def storable(text: str) -> bool:
    """Whether a text from outside can be looked up: PostgreSQL refuses NUL, and the whole statement."""
    return "\0" not in text


def refused(engine: sa.Engine, error: sa.exc.SQLAlchemyError) -> FedgeError:
    """The error to raise for one of the database, in one line and without a password."""
    line = " ".join(str(getattr(error, "orig", error)).split())[:300]
    return FedgeError(f"database {engine.url.render_as_string(hide_password=True)}: {line}")


def _durable_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say, see _begin_sqlite
    try:
        connection.execute("PRAGMA busy_timeout=10000")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a committed round survives a power cut
        connection.execute("PRAGMA foreign_keys=ON")
    except sqlite3.OperationalError as error:  # SQLAlchemy wraps only what it runs itself
        raise FedgeError(
            f"database {DATABASE}: {error}; see whether its disk is full, failing or read-only: what was "
            "committed is safe"
        ) from error
    except sqlite3.DatabaseError as error:
        raise FedgeError(f"database {DATABASE}: {error}; restore a backup") from error


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads and then writes fails at once if another one wrote in between; one that is
    # IMMEDIATE from its start waits its turn.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
