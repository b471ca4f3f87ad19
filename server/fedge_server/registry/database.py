"""The server's memory: runs, committed rounds, variants and releases, linked from device back to updates.

SQLAlchemy over SQLite (write-ahead log) or PostgreSQL by URL. Big bytes lie in the content store and are
named here by their SHA-256. A round counts when its row is committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from fedge import tensors
from fedge.errors import FedgeError, RoundError, UserError
from fedge.files import sha256
from fedge.learning.state import NamedArrays
from fedge_server.registry.store import ContentStore
from fedge_server.rounds.record import RoundRecord

SCHEMA_VERSION = 1
KEPT_ROUNDS = 2  # models and strategy states of older rounds are dropped, their records stay

_metadata = sa.MetaData()
_about = sa.Table("about", _metadata, sa.Column("schema_version", sa.Integer, primary_key=True))
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("data", sa.String(64), nullable=False),  # digest of the server's data
    sa.Column("status", sa.String(16), nullable=False),  # running, done, failed
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("created", sa.String(32), nullable=False),
)
_rounds = sa.Table(
    "rounds",
    _metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("record", sa.JSON, nullable=False),
    sa.Column("model", sa.String(64), nullable=False),  # SHA-256 of the safetensors in the store
    sa.Column("state", sa.String(64), nullable=False),  # SHA-256 of the strategy's state in the store
    sa.Column("committed", sa.String(32), nullable=False),
)
_releases = sa.Table(
    "releases",
    _metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("global_model", sa.String(64), nullable=False),
    sa.Column("manifest", sa.String(64), nullable=False),  # SHA-256 of the signed manifest's payload
    sa.Column("created", sa.String(32), nullable=False),
)
_variants = sa.Table(
    "variants",
    _metadata,
    sa.Column("release", sa.ForeignKey("releases.version"), primary_key=True),
    sa.Column("tier", sa.String(32), primary_key=True),
    sa.Column("recipe", sa.String(255), nullable=False),
    sa.Column("wire", sa.String(64), nullable=False),
    sa.Column("installed", sa.String(64), nullable=False),
    sa.Column("evidence", sa.String(64), nullable=False),  # SHA-256 of the gate report
)


@dataclass(frozen=True, slots=True)
class CommittedRound:
    """The last committed round of a run, with what is needed to go on from it."""

    record: RoundRecord
    model: NamedArrays
    model_sha256: str
    state: bytes  # the strategy's, see strategies.state


class Registry:
    """Runs, rounds and releases under one home folder."""

    def __init__(self, engine: sa.Engine, store: ContentStore) -> None:
        self._engine = engine
        self.store = store

    @classmethod
    def open(cls, home: Path, url: str | None = None) -> Self:
        """Open or create the registry of a home folder.

        Args:
            home: holds the content store, and `fedge.db` unless a URL is given.
            url: an SQLAlchemy URL of a database elsewhere.

        Raises:
            FedgeError: the database has another schema version than this fedge writes.
        """
        home.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url or f"sqlite:///{home / 'fedge.db'}")
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _durable_sqlite)
        _metadata.create_all(engine)
        with engine.begin() as connection:
            found = connection.scalar(sa.select(_about.c.schema_version))
            if found is None:
                connection.execute(_about.insert().values(schema_version=SCHEMA_VERSION))
            elif found != SCHEMA_VERSION:
                raise FedgeError(f"database in {home}: schema {found}, but this fedge reads {SCHEMA_VERSION}")
        return cls(engine, ContentStore(home / "store"))

    def close(self) -> None:
        """Release the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_run(self, run_id: str, *, task: str, seed: int, config: Mapping[str, Any], data: str) -> None:
        """Write a run down, or set it to running again when it is there.

        Args:
            run_id: its name.
            task: name of the task.
            seed: of the run.
            config: the whole configuration.
            data: digest of the server's data, by purpose.

        Raises:
            UserError: it is there with another configuration or other data; going on would mix the two.
        """
        with self._engine.begin() as connection:
            known = connection.execute(sa.select(_runs).where(_runs.c.id == run_id)).mappings().first()
            if known is None:
                values = {"task": task, "seed": seed, "config": dict(config), "data": data}
                connection.execute(
                    _runs.insert().values(id=run_id, status="running", reason="", created=_now(), **values)
                )
                return
            for name, value in (("configuration", dict(config)), ("data", data)):
                if known["config" if name == "configuration" else name] != value:
                    raise UserError(f"run {run_id}: its {name} has changed since it began; begin a new run")
            connection.execute(_runs.update().where(_runs.c.id == run_id).values(status="running", reason=""))

    def end_run(self, run_id: str, status: str, reason: str) -> None:
        """Set a run to done or failed."""
        with self._engine.begin() as connection:
            connection.execute(
                _runs.update().where(_runs.c.id == run_id).values(status=status, reason=reason)
            )

    def runs(self) -> list[dict[str, Any]]:
        """All runs, oldest first."""
        with self._engine.connect() as connection:
            query = sa.select(_runs).order_by(_runs.c.created)
            return [dict(row) for row in connection.execute(query).mappings()]

    def commit_round(self, run_id: str, record: RoundRecord, model: NamedArrays, state: bytes) -> str:
        """Make a round count: bytes first, then its row; returns the model's SHA-256.

        Raises:
            RoundError: the round is committed already; an update must not count twice.
        """
        model_sha = self.store.put(tensors.dump(model))
        state_sha = self.store.put(state)
        try:
            with self._engine.begin() as connection:
                connection.execute(
                    _rounds.insert().values(
                        run_id=run_id,
                        number=record.round,
                        record=record.to_json(),
                        model=model_sha,
                        state=state_sha,
                        committed=_now(),
                    )
                )
        except sa.exc.IntegrityError as error:
            raise RoundError(f"run {run_id}: round {record.round} is committed already") from error
        self._drop(run_id, record.round - KEPT_ROUNDS)
        return model_sha

    def _drop(self, run_id: str, number: int) -> None:
        """Remove the bytes of the round that has become too old, unless something newer names them."""
        rounds, old = _rounds.c, (_rounds.c.run_id == run_id) & (_rounds.c.number <= number)
        with self._engine.connect() as connection:
            query = sa.select(rounds.model, rounds.state).where(
                rounds.run_id == run_id, rounds.number == number
            )
            for name in {name for row in connection.execute(query) for name in row}:
                named = sa.or_(rounds.model == name, rounds.state == name) & ~old
                released = _releases.c.global_model == name
                if not connection.scalar(sa.select(sa.exists().where(named))) and not connection.scalar(
                    sa.select(sa.exists().where(released))
                ):
                    self.store.remove(name)

    def records(self, run_id: str) -> list[RoundRecord]:
        """The records of a run's committed rounds, in order, round 0 included."""
        query = sa.select(_rounds.c.record).where(_rounds.c.run_id == run_id).order_by(_rounds.c.number)
        with self._engine.connect() as connection:
            return [RoundRecord.from_json(value) for value in connection.scalars(query)]

    def last_round(self, run_id: str) -> CommittedRound | None:
        """The last committed round with its model and state, verified against their digests."""
        query = (
            sa.select(_rounds).where(_rounds.c.run_id == run_id).order_by(_rounds.c.number.desc()).limit(1)
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        model, _ = tensors.parse(self.store.get(row["model"]))
        record = RoundRecord.from_json(row["record"])
        return CommittedRound(record, model, row["model"], self.store.get(row["state"]))

    def record_release(
        self,
        *,
        version: int,
        run_id: str,
        round_number: int,
        global_model: str,
        manifest: bytes,
        variants: Sequence[Mapping[str, str]],
    ) -> None:
        """Write down a published release and its variants (tier, recipe, wire, installed, evidence)."""
        with self._engine.begin() as connection:
            connection.execute(
                _releases.insert().values(
                    version=version,
                    run_id=run_id,
                    round=round_number,
                    global_model=global_model,
                    manifest=sha256(manifest),
                    created=_now(),
                )
            )
            if variants:
                connection.execute(
                    _variants.insert(), [{"release": version, **variant} for variant in variants]
                )

    def releases(self) -> list[dict[str, Any]]:
        """All releases, oldest first."""
        with self._engine.connect() as connection:
            query = sa.select(_releases).order_by(_releases.c.version)
            return [dict(row) for row in connection.execute(query).mappings()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _durable_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a committed round survives a power cut
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()
