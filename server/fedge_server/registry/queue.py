"""Messages between runs and devices: each is answered once, and survives a restart of the hub.

    open ──answer──> answered ──close──> done
      └──close──> closed ──answer──> late

The last three are small remains that tell a repeated answer from a late one. They go when the run closes
messages again (done), or after KEPT_S (closed, late).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import FedgeError, RoundError
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, storable, writing

OPEN, ANSWERED, DONE, CLOSED, LATE = "open", "answered", "done", "closed", "late"
ACCEPTED, AGAIN = "accepted", "again"  # outcomes of an answer, besides LATE
KEPT_S: Final = 3600.0  # how long late answers to a closed message are counted
_AT_ONCE: Final = 5000  # parameters of one statement

_messages, _contents, _runs = schema.messages, schema.contents, schema.runs


@dataclass(frozen=True, slots=True)
class Queued:
    """A message of a run for a device."""

    id: str
    run_id: str
    session: str
    device_id: str
    node_id: int
    task: str
    task_digest: str
    type: str  # train, evaluate, query.NAME
    group_id: str  # the round
    content: str  # SHA-256 of a serialised Content
    created: float  # Unix seconds
    deadline: float  # Unix seconds
    max_result_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a device sent back."""

    message_id: str
    result: bytes  # a serialised Result
    spool: str = ""  # name of the file that holds its object; empty: none
    node_id: int = 0  # filled in by `answered`


@dataclass(frozen=True, slots=True)
class CloseCount:
    """What a run's round cost, since the last one was closed."""

    late: int  # answers that came too late
    bytes_down: int  # tensor bytes that travelled
    bytes_up: int


class Queue:
    """The messages of all runs; every method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def attach(self, run_id: str) -> str:
        """Begin a session of a run; what its earlier sessions still waited for is closed.

        Raises:
            RoundError: there is no such run.
        """
        session = secrets.token_hex(8)
        with writing(self._engine) as connection:
            found = connection.execute(_runs.update().where(_runs.c.id == run_id).values(session=session))
            if not found.rowcount:
                raise RoundError(f"run {run_id!r}: there is none to attach to")
            _settle(connection, _messages.c.run_id == run_id)
        return session

    def push(
        self, run_id: str, session: str, messages: Sequence[Queued], contents: Mapping[str, bytes]
    ) -> None:
        """Queue messages; those whose id is known already are left as they are.

        Args:
            run_id: of all of them.
            session: the run's newest.
            messages: each names a content that is in `contents` or was queued before and is still open.
            contents: bodies by their SHA-256.

        Raises:
            RoundError: another session has begun since, or a message is of another run or session, or
                names a content that is not there.
        """
        wrong = [m.id for m in messages if (m.run_id, m.session) != (run_id, session)]
        if wrong:
            raise RoundError(f"run {run_id}: message {wrong[0][:60]!r} is not of session {session!r}")
        with writing(self._engine) as connection:
            newest = connection.scalar(sa.select(_runs.c.session).where(_runs.c.id == run_id))
            if not session or newest != session:
                raise RoundError(f"run {run_id}: session {session!r} is over; a newer worker has taken over")
            known = _known(connection, _messages.c.id, [message.id for message in messages])
            new = {message.id: message for message in messages if message.id not in known}
            needed = sorted({message.content for message in new.values()})
            stored = _known(connection, _contents.c.digest, needed)
            if absent := [name for name in needed if name not in stored and name not in contents]:
                raise RoundError(f"run {run_id}: content {absent[0][:60]!r} was never handed in")
            bodies = [{"digest": name, "body": contents[name]} for name in needed if name not in stored]
            if bodies:
                connection.execute(_contents.insert(), bodies)
            if new:
                rows = [{**asdict(message), "state": OPEN, "spool": ""} for message in new.values()]
                connection.execute(_messages.insert(), rows)

    def open_messages(self) -> list[Queued]:
        """All messages that wait for an answer, oldest first: what a hub that starts has to deliver."""
        columns = [_messages.c[field.name] for field in fields(Queued)]
        query = (
            sa.select(*columns).where(_messages.c.state == OPEN).order_by(_messages.c.created, _messages.c.id)
        )
        with reading(self._engine) as connection:
            return [Queued(*row) for row in connection.execute(query)]

    def content(self, digest: str) -> bytes:
        """The serialised Content of a digest.

        Raises:
            FedgeError: no open message names it.
        """
        with reading(self._engine) as connection:
            body = connection.scalar(sa.select(_contents.c.body).where(_contents.c.digest == digest))
        if body is None:
            raise FedgeError(f"queue: content {digest[:8]} is not there; its messages are closed")
        return bytes(body)

    def answer(self, answers: Sequence[Answer]) -> list[str]:
        """Keep answers that came, all in one transaction.

        Returns:
            For each, in order: "accepted"; "again", when the message was answered before (the first answer
            counts); or "late", when nobody waits for it any more.
        """
        outcomes: list[str] = []
        accepted: list[dict[str, Any]] = []
        late: dict[str, int] = {}
        with writing(self._engine) as connection:
            states = _states(connection, [answer.message_id for answer in answers])
            for answer in answers:
                name = answer.message_id
                run_id, state = states.get(name, ("", LATE))
                if state == OPEN:
                    states[name] = (run_id, ANSWERED)
                    accepted.append({"name": name, "bytes": answer.result, "file": answer.spool})
                elif state == CLOSED:
                    states[name] = (run_id, LATE)
                    late[name] = 1
                outcomes.append({OPEN: ACCEPTED, ANSWERED: AGAIN, DONE: AGAIN}.get(state, LATE))
            _accept(connection, accepted)
            _count_late(connection, [(name, states[name][0]) for name in late])
        return outcomes

    def answered(self, run_id: str, session: str, message_ids: Sequence[str]) -> list[Answer]:
        """The answers that are there to messages of a session, in no particular order."""
        table = _messages.c
        own = (table.run_id == run_id) & (table.session == session) & (table.state == ANSWERED)
        found: list[Answer] = []
        with reading(self._engine) as connection:
            for names in _chunks(message_ids):
                query = sa.select(table.id, table.result, table.spool, table.node_id)
                rows = connection.execute(query.where(own & table.id.in_(names)))
                found += [Answer(name, bytes(result), spool, node) for name, result, spool, node in rows]
        return found

    def close(self, run_id: str, session: str, message_ids: Sequence[str]) -> CloseCount:
        """Wait for these messages no longer, and let go of their bytes; returns the cost since last time."""
        table = _messages.c
        own = (table.run_id == run_id) & (table.session == session)
        with writing(self._engine) as connection:
            old = (table.state == DONE) | (
                table.state.in_((CLOSED, LATE)) & (table.deadline < time.time() - KEPT_S)
            )
            connection.execute(_messages.delete().where((table.run_id == run_id) & old))
            for names in _chunks(message_ids):
                _settle(connection, own & table.id.in_(names))
            query = sa.select(_runs.c.late, _runs.c.bytes_down, _runs.c.bytes_up)
            row = connection.execute(query.where(_runs.c.id == run_id)).first()
            zero = {"late": 0, "bytes_down": 0, "bytes_up": 0}
            connection.execute(_runs.update().where(_runs.c.id == run_id).values(**zero))
        return CloseCount(*row) if row else CloseCount(0, 0, 0)

    def expire(self, message_ids: Sequence[str]) -> None:
        """Take no more answers to these messages: their deadline has passed. Later ones are late."""
        with writing(self._engine) as connection:
            for names in _chunks(message_ids):
                _settle(connection, _messages.c.id.in_(names) & (_messages.c.state == OPEN))

    def traffic(self, run_id: str, down: int, up: int) -> None:
        """Add tensor bytes that have travelled for a run."""
        added = {"bytes_down": _runs.c.bytes_down + down, "bytes_up": _runs.c.bytes_up + up}
        with writing(self._engine) as connection:
            connection.execute(_runs.update().where(_runs.c.id == run_id).values(**added))

    def forget(self, run_id: str) -> None:
        """Remove all messages of a run that is over, and end its session."""
        with writing(self._engine) as connection:
            _settle(connection, _messages.c.run_id == run_id)
            connection.execute(_messages.delete().where(_messages.c.run_id == run_id))
            connection.execute(_runs.update().where(_runs.c.id == run_id).values(session=""))


def _accept(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    update = _messages.update().where(_messages.c.id == sa.bindparam("name"))
    values = {"state": ANSWERED, "result": sa.bindparam("bytes"), "spool": sa.bindparam("file")}
    connection.execute(update.values(**values), rows)


def _count_late(connection: sa.Connection, late: Sequence[tuple[str, str]]) -> None:
    """Count answers that came too late, each once."""
    for names in _chunks([name for name, _ in late]):
        connection.execute(_messages.update().where(_messages.c.id.in_(names)).values(state=LATE))
    for run_id in sorted({run for _, run in late}):
        count = sum(run == run_id for _, run in late)
        update = _runs.update().where(_runs.c.id == run_id)
        connection.execute(update.values(late=_runs.c.late + count))


def _settle(connection: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    """Close messages that are open or answered: their bytes go, and contents that nothing names."""
    which = which & _messages.c.state.in_((OPEN, ANSWERED))
    named = set(connection.scalars(sa.select(_messages.c.content).where(which).distinct()))
    state = sa.case((_messages.c.state == ANSWERED, DONE), else_=CLOSED)
    remains = {"state": state, "content": None, "result": None, "spool": ""}
    connection.execute(_messages.update().where(which).values(**remains))
    unnamed = ~sa.exists().where(_messages.c.content == _contents.c.digest)
    for digests in _chunks(sorted(name for name in named if name)):
        connection.execute(_contents.delete().where(_contents.c.digest.in_(digests) & unnamed))


def _states(connection: sa.Connection, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Run and state of each message that is known."""
    found: dict[str, tuple[str, str]] = {}
    columns = _messages.c
    for some in _chunks([name for name in names if storable(name)]):
        query = sa.select(columns.id, columns.run_id, columns.state).where(columns.id.in_(some))
        found |= {name: (run_id, state) for name, run_id, state in connection.execute(query)}
    return found


def _known(connection: sa.Connection, column: sa.ColumnElement[str], names: Sequence[str]) -> set[str]:
    return {
        name
        for some in _chunks(names)
        for name in connection.scalars(sa.select(column).where(column.in_(some)))
    }


def _chunks(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _AT_ONCE):
        yield names[start : start + _AT_ONCE]
