"""The server's memory: runs, committed rounds, variants and releases, linked from device back to updates.

SQLAlchemy over SQLite (write-ahead log) or PostgreSQL by URL. Big bytes lie in the content store and are
named here by their SHA-256. A round counts when its row is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa

from fedge import tensors
from fedge.errors import RoundError, UserError
from fedge.files import sha256
from fedge_server.registry import schema
from fedge_server.registry.devices import Devices
from fedge_server.registry.drafts import Drafts
from fedge_server.registry.engine import connect, reading, writing
from fedge_server.registry.living import drafted_models, when
from fedge_server.registry.queue import Queue
from fedge_server.registry.store import ContentStore
from fedge_server.registry.upgrade import upgrade
from fedge_server.rounds.record import RoundRecord

if TYPE_CHECKING:
    from fedge.learning.state import NamedArrays  # which loads torch

KEPT_ROUNDS = 2  # models and strategy states of older rounds are dropped, their records stay

RUN_STATUSES = ("queued", "running", "stopping", "stopped", "done", "failed")

_runs, _rounds, _releases, _variants = schema.runs, schema.rounds, schema.releases, schema.variants


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
        self.engine = engine
        self.store = store
        self.devices = Devices(engine)
        self.queue = Queue(engine)
        self.drafts = Drafts(engine, store)

    @classmethod
    def open(cls, home: Path, url: str | None = None) -> Self:
        """Open the registry of a home folder; it is made when absent, and upgraded when old.

        Args:
            home: holds the content store, and `fedge.db` unless a URL is given.
            url: an SQLAlchemy URL of a database elsewhere.

        Raises:
            FedgeError: a newer fedge has written the database, or it cannot be reached.
            UserError: the folder cannot be made, or the URL is none or names a database that is not served.
        """
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"home {home}: cannot be made ({error.strerror})") from error
        engine = connect(home, url)
        try:
            upgrade(engine, home)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, ContentStore(home / "store"))

    def close(self) -> None:
        """Release the database."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def queue_run(self, run_id: str, *, task: str, seed: int, config: Mapping[str, Any]) -> None:
        """Write down a run that a worker shall begin.

        Raises:
            UserError: there is a run of this name.
        """
        values = {"task": task, "seed": seed, "config": dict(config), "data": ""}
        with writing(self.engine) as connection:
            if _run(connection, run_id) is not None:
                raise UserError(f"run {run_id!r}: there is one already; choose another name")
            _insert(connection, run_id, "queued", values)

    def begin_run(self, run_id: str, *, task: str, seed: int, config: Mapping[str, Any], data: str) -> None:
        """Write a run down as running, begin a queued one, or set one to running again.

        A run that is asked to stop stays so: a worker that starts meanwhile must see it.

        Args:
            run_id: its name.
            task: name of the task.
            seed: of the run.
            config: the whole configuration.
            data: digest of the server's data, by purpose.

        Raises:
            UserError: it is there with another configuration or other data; going on would mix the two. Or
                what it would go on from is not kept any more.
        """
        values = {"task": task, "seed": seed, "config": dict(config), "data": data}
        with writing(self.engine) as connection:
            known = _run(connection, run_id)
            if known is None:
                _insert(connection, run_id, "running", values)
                return
            _check_kept(known)
            for name, value in (("configuration", dict(config)), ("data", data)):
                before = known["config" if name == "configuration" else name]
                if before not in (value, ""):  # a queued run does not know its data yet
                    raise UserError(f"run {run_id}: its {name} has changed since it began; begin a new run")
            status = "stopping" if known["status"] == "stopping" else "running"
            _update(connection, run_id, data=data, status=status, reason="")

    def begin_queued(self, run_id: str) -> bool:
        """Set a queued run to running; False when it is queued no longer: it was asked to stop meanwhile."""
        queued = (_runs.c.id == run_id) & (_runs.c.status == "queued")
        with writing(self.engine) as connection:
            changed = connection.execute(_runs.update().where(queued).values(status="running", reason=""))
        return bool(changed.rowcount)

    def queue_again(self, run_id: str) -> None:
        """Write down that a worker shall go on with a run that has failed or was stopped.

        Raises:
            UserError: there is no such run, it is in another state, or what it would go on from is not kept
                any more.
        """
        with writing(self.engine) as connection:  # whoever retires decides in a transaction too
            run = _run(connection, run_id)
            if run is None:
                raise UserError(f"run {run_id!r}: there is none")
            if run["status"] not in ("failed", "stopped"):
                raise UserError(f"run {run_id}: is {run['status']}; only a failed or stopped run is resumed")
            _check_kept(run)
            _update(connection, run_id, status="queued", reason="")

    def end_run(self, run_id: str, status: str, reason: str) -> None:
        """Set a run to done, stopped or failed."""
        self.set_status(run_id, status, reason)

    def set_status(self, run_id: str, status: str, reason: str = "") -> None:
        """Set a run's status and why it has it.

        Raises:
            ValueError: no status of RUN_STATUSES.
        """
        if status not in RUN_STATUSES:
            raise ValueError(f"{status!r} is no status of a run")
        with writing(self.engine) as connection:
            _update(connection, run_id, status=status, reason=reason)

    def request_stop(self, run_id: str) -> str:
        """Ask a run to stop after its round; one that has not begun is stopped at once.

        Returns:
            Its status now: "stopping" or "stopped".

        Raises:
            UserError: there is no such run, or it is over.
        """
        with writing(self.engine) as connection:
            run = _run(connection, run_id)
            if run is None:
                raise UserError(f"run {run_id!r}: there is none")
            after = {"queued": "stopped", "running": "stopping", "stopping": "stopping"}.get(run["status"])
            if after is None:
                raise UserError(f"run {run_id}: is {run['status']} already")
            _update(connection, run_id, status=after, reason="asked to stop")
        return after

    def count_restart(self, run_id: str) -> int:
        """Count that a run's worker was started again; returns how often so far."""
        with writing(self.engine) as connection:
            _update(connection, run_id, restarts=_runs.c.restarts + 1)
            run = _run(connection, run_id)
        return int(run["restarts"]) if run else 0

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The run of this name."""
        with reading(self.engine) as connection:
            return _run(connection, run_id)

    def runs(self) -> list[dict[str, Any]]:
        """All runs, oldest first."""
        with reading(self.engine) as connection:
            query = sa.select(_runs).order_by(_runs.c.created)
            return [dict(row) for row in connection.execute(query).mappings()]

    def commit_round(
        self,
        run_id: str,
        record: RoundRecord,
        model: NamedArrays,
        state: bytes,
        about: Mapping[str, str] | None = None,
    ) -> str:
        """Make a round count: bytes first, then its row; returns the model's SHA-256.

        Args:
            run_id: of the run.
            record: of the round.
            model: the global model's state after it.
            state: the strategy's.
            about: metadata of the model's file.

        Raises:
            RoundError: the round is committed already; an update must not count twice.
        """
        try:
            with self.store.adding():
                model_sha = self.store.put_stream(tensors.dump_chunks(model, about or {}))
                state_sha = self.store.put(state)
                with writing(self.engine) as connection:
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
        with suppress(BlockingIOError):  # something is being put: then `retention.prune` finds it
            self._drop(run_id, record.round - KEPT_ROUNDS)
        return model_sha

    def _drop(self, run_id: str, number: int) -> None:
        """Remove the bytes of the round that has become too old, unless something newer names them."""
        rounds, old = _rounds.c, (_rounds.c.run_id == run_id) & (_rounds.c.number <= number)
        query = sa.select(rounds.model, rounds.state).where(rounds.run_id == run_id, rounds.number == number)
        with self.store.removing(), reading(self.engine) as connection:
            names = {name for row in connection.execute(query) for name in row}
            drafted = set(drafted_models(connection)) if names else set()
            for name in names - drafted:
                named = sa.or_(rounds.model == name, rounds.state == name) & ~old
                released = _releases.c.global_model == name
                if not connection.scalar(sa.select(sa.exists().where(named))) and not connection.scalar(
                    sa.select(sa.exists().where(released))
                ):
                    self.store.remove(name)

    def records(self, run_id: str) -> list[RoundRecord]:
        """The records of a run's committed rounds, in order, round 0 included."""
        query = sa.select(_rounds.c.record).where(_rounds.c.run_id == run_id).order_by(_rounds.c.number)
        with reading(self.engine) as connection:
            return [RoundRecord.from_json(value) for value in connection.scalars(query)]

    def last_round(self, run_id: str) -> CommittedRound | None:
        """The last committed round with its model and state, verified against their digests.

        Raises:
            UserError: its bytes are not there: the run was retired, or the store has lost them.
            DigestError: they are damaged.
        """
        query = (
            sa.select(_rounds).where(_rounds.c.run_id == run_id).order_by(_rounds.c.number.desc()).limit(1)
        )
        with reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        if not (self.store.has(row["model"]) and self.store.has(row["state"])):
            lost = "model or state of its last round is not in the store; restore it from a backup"
            raise UserError(f"run {run_id}: {self.why_gone(run_id) or lost}")
        self.store.open(row["model"]).close()  # checks its digest
        model, _ = tensors.load(self.store.path(row["model"]))
        record = RoundRecord.from_json(row["record"])
        return CommittedRound(record, model, row["model"], self.store.get(row["state"]))

    def why_gone(self, run_id: str) -> str | None:
        """Why model and state of a run are not kept any more, and what to do; None: they are."""
        return _why_gone(self.run(run_id) or {})

    def record_release(
        self,
        *,
        version: int,
        run_id: str,
        round_number: int,
        global_model: str,
        manifest: bytes,
        variants: Sequence[Mapping[str, str]],
        further: Callable[[sa.Connection], None] = lambda _: None,
    ) -> None:
        """Write down a published release and its variants.

        Args:
            version: of the release.
            run_id: of its lineage, as the two after it.
            round_number: of the run.
            global_model: SHA-256.
            manifest: its bytes, which go into the store.
            variants: tier, recipe, and the digests wire, installed, evidence, golden, reference (if any).
            further: is written in the same transaction.
        """
        with self.store.adding(), writing(self.engine) as connection:
            self.store.put(manifest)
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
            further(connection)

    def releases(self) -> list[dict[str, Any]]:
        """All releases, oldest first."""
        with reading(self.engine) as connection:
            query = sa.select(_releases).order_by(_releases.c.version)
            return [dict(row) for row in connection.execute(query).mappings()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run(connection: sa.Connection, run_id: str) -> dict[str, Any] | None:
    row = connection.execute(sa.select(_runs).where(_runs.c.id == run_id)).mappings().first()
    return dict(row) if row else None


def _why_gone(run: Mapping[str, Any]) -> str | None:
    retired = run.get("retired")
    if retired is None:
        return None
    return (
        f"its model and state were removed {when(retired)}, as newer runs took their place "
        "([keeping] runs); begin a new run, or restore a backup from before"
    )


def _check_kept(run: Mapping[str, Any]) -> None:
    if (why := _why_gone(run)) is not None:
        raise UserError(f"run {run['id']}: {why}")


def _insert(connection: sa.Connection, run_id: str, status: str, values: Mapping[str, Any]) -> None:
    connection.execute(_runs.insert().values(id=run_id, status=status, reason="", created=_now(), **values))


def _update(connection: sa.Connection, run_id: str, **values: Any) -> None:
    connection.execute(_runs.update().where(_runs.c.id == run_id).values(**values))
