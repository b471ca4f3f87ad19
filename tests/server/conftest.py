"""Both databases, for real: SQLite in a folder, and a private PostgreSQL server on a unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedge_server.registry.database import Registry

_NUMBERS = count()


def binary(name: str) -> str | None:
    """A program of PostgreSQL; Debian keeps those of a server out of the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))


def unprivileged() -> dict[str, Any]:
    """What makes a child run as a user that PostgreSQL accepts: it refuses root."""
    if os.getuid():
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    return {}


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    until = time.monotonic() + 60
    while True:
        try:
            engine.connect().close()
        except sa.exc.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a private server's `postgres` database; each process of the tests has its own server."""
    initdb, postgres = binary("initdb"), binary("postgres")
    if not (initdb and postgres):
        pytest.skip("PostgreSQL is not installed: no initdb")
    pytest.importorskip("psycopg")
    user = unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="fedge-pg-"))  # short: a socket's path has at most 107 bytes
    if user:
        os.chown(folder, user["user"], user["group"])
    data, log = folder / "data", folder / "log"
    make = [initdb, "--pgdata", data, "--username", "fedge", "--auth", "trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
    settings = ("listen_addresses=", "fsync=off", "full_page_writes=off", "autovacuum=off")
    serve = [postgres, "-D", data, "-k", folder, *(word for value in settings for word in ("-c", value))]
    with_parent = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []  # ends with the tests
    with log.open("wb") as file:
        server = subprocess.Popen([*with_parent, *serve], stdout=file, stderr=file, cwd=folder, **user)
    url = f"postgresql+psycopg://fedge@/postgres?host={folder}"
    try:
        wait_until_ready(server, url, log)
        yield url
    finally:
        server.send_signal(signal.SIGQUIT)  # at once: nothing of it is wanted
        server.wait(60)
        shutil.rmtree(folder)


@pytest.fixture
def new_postgresql_database(postgresql_server: str) -> Iterator[Callable[[], str]]:
    """Makes an empty database and returns its URL."""
    admin = sa.create_engine(postgresql_server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    made: list[str] = []

    def new() -> str:
        made.append(f"fedge_{next(_NUMBERS)}")
        with admin.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {made[-1]}"))
        return postgresql_server.replace("/postgres?", f"/{made[-1]}?")

    yield new
    with admin.connect() as connection:
        for name in made:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
def postgresql_url(new_postgresql_database: Callable[[], str]) -> str:
    """The URL of an empty database of its own."""
    return new_postgresql_database()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """What `Registry.open` takes as URL; every test of it runs on both databases."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")


@pytest.fixture(autouse=True)
def quick_databases(quick_sqlite: None) -> None:
    """Few tests of this folder are about making a database; they replace this."""


@pytest.fixture
def registry(tmp_path: Path, database_url: str | None) -> Iterator[Registry]:
    """An empty registry, on SQLite and on PostgreSQL."""
    with Registry.open(tmp_path, database_url) as opened:
        yield opened
