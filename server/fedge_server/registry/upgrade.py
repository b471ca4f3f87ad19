"""Bringing a database to the newest schema; Alembic is loaded only when there is something to do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import sqlalchemy as sa

from fedge.errors import FedgeError
from fedge_server.registry.engine import opening, reading, refused, writing
from fedge_server.registry.schema import HEAD, REVISIONS

FOLDER = Path(__file__).parent / "migrations"


def upgrade(engine: sa.Engine, home: Path) -> None:
    """Make or upgrade the tables; several processes may do so at the same time.

    Raises:
        FedgeError: a newer fedge has written the database, or it cannot be reached.
    """
    sqlite = engine.dialect.name == "sqlite"
    with opening(home) if sqlite else nullcontext():
        try:
            with reading(engine) as connection:
                if _revision(engine, connection) == HEAD:
                    return
            with writing(engine) as connection:
                found = _revision(engine, connection)  # another process may have been faster
                if found != HEAD:
                    run_migrations(connection, found)
        except sa.exc.DatabaseError as error:  # no right to make tables, or other tables of these names
            raise refused(engine, error) from error


def run_migrations(connection: sa.Connection, found: str, target: str = HEAD) -> None:
    """Apply the revisions after `found` ("" is an empty database) up to `target`, within the transaction."""
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(FOLDER), version_locations=[str(FOLDER)])

    def steps(current: object, _: object) -> object:
        return scripts._upgrade_revs(target, current)  # what alembic.command.upgrade hands over

    with EnvironmentContext(Config(), scripts, fn=steps, destination_rev=target) as environment:
        environment.configure(connection=connection)
        if found == REVISIONS[0] and not sa.inspect(connection).has_table("alembic_version"):
            environment.get_context().stamp(scripts, found)
        environment.run_migrations()


def _revision(engine: sa.Engine, connection: sa.Connection) -> str:
    """The revision that the database is at; empty for a database without tables of fedge.

    Raises:
        FedgeError: this fedge does not know it.
    """
    inspector = sa.inspect(connection)
    if inspector.has_table("alembic_version"):
        found = str(connection.scalar(sa.text("SELECT version_num FROM alembic_version")) or "")
    elif inspector.has_table("about"):  # before there were migrations
        number = connection.scalar(sa.text("SELECT schema_version FROM about"))
        found = f"{number:04}" if number is not None else ""
    else:
        return ""
    if found not in REVISIONS:
        where = engine.url.render_as_string(hide_password=True)
        raise FedgeError(
            f"database {where}: schema {found or 'unknown'}, but this fedge reads up to {HEAD}; "
            "install the fedge that wrote it, or a newer one"
        )
    return found
