"""Learnings in the database: each event is one transaction, with its entries in the audit trail."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import UserError
from fedge_server.continual.deciding import decide
from fedge_server.continual.state import Event, Note, State, Status
from fedge_server.continual.terms import Terms
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, storable, writing
from fedge_server.rollout import audit

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
"""Names a learning, and begins the names of its runs."""

_table, _runs = schema.learnings, schema.runs


@dataclass(frozen=True, slots=True)
class Learning:
    """What is learned again and again, and where that stands."""

    name: str
    task: str
    config: Mapping[str, Any]  # of its runs
    terms: Terms
    state: State

    @property
    def run_id(self) -> str:
        """Of the cycle under way, or of the last one."""
        return run_of(self.name, self.state.cycle)

    @property
    def tiers(self) -> tuple[str, ...]:
        """That its releases are for."""
        return tuple(sorted(self.config.get("tiers", {})))


def run_of(name: str, cycle: int) -> str:
    """The run of a cycle: a kill finds it again by its name."""
    return f"{name}-{cycle}"


def subject(name: str) -> str:
    """What the audit trail calls a learning."""
    return f"learning {name}"


class Learnings:
    """The learnings of a registry.

    Args:
        engine: of the registry.
        clock: Unix seconds.
    """

    def __init__(self, engine: sa.Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine, self._clock = engine, clock

    def start(self, name: str, task: str, config: Mapping[str, Any], terms: Terms, *, who: str) -> Learning:
        """Begin a learning, or give one that is there another configuration and other terms.

        A cycle that is under way goes on as it began; a new learning counts on from runs of its name.

        Raises:
            UserError: another learning has one of its tiers: they would take turns on the same devices.
        """
        with writing(self._engine) as connection:
            _check_tiers(connection, name, config["tiers"])
            values = {"task": task, "config": dict(config), "terms": terms.to_json()}
            known = _read(connection, name)
            if known is None:
                state = State(cycle=_last_cycle(connection, name))
                row = {"name": name, "state": state.to_json(), "created": self._clock()}
                connection.execute(_table.insert().values(**row, **values))
            else:
                connection.execute(_table.update().where(_table.c.name == name).values(**values))
            what = "learning begun" if known is None else "terms changed"
            self._note(connection, name, Note(who, what, f"task {task}, tiers {', '.join(config['tiers'])}"))
            return _required(connection, name)

    def remove(self, name: str, *, who: str) -> None:
        """Forget a learning; its runs and releases stay.

        Raises:
            UserError: there is none, or a cycle is under way.
        """
        with writing(self._engine) as connection:
            known = _required(connection, name)
            if known.state.status is not Status.WATCHING:
                raise UserError(
                    f"learning {name}: cycle {known.state.cycle} is {known.state.status.value}; stop it first"
                )
            connection.execute(_table.delete().where(_table.c.name == name))
            self._note(connection, name, Note(who, "learning removed"))

    def happened(self, name: str, event: Event) -> Learning:
        """Decide, and write down all that follows.

        Raises:
            UserError: there is no such learning, or a person asks for what its state does not allow.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            before = _required(connection, name)
            after, notes = decide(before.terms.policy, before.state, event, now)
            if replace(after, at=before.state.at) != before.state:
                changed = _table.update().where(_table.c.name == name).values(state=after.to_json())
                connection.execute(changed)
            for note in notes:
                self._note(connection, name, note)
            return replace(before, state=after)

    def changes(self, learning: Learning, event: Event) -> bool:
        """Whether an event would change anything: nothing is written for the passing of time alone."""
        after, _ = decide(learning.terms.policy, learning.state, event, self._clock())
        return replace(after, at=learning.state.at) != learning.state

    def get(self, name: str) -> Learning:
        """One learning.

        Raises:
            UserError: there is none of this name.
        """
        with reading(self._engine) as connection:
            return _required(connection, name)

    def all(self) -> list[Learning]:
        """All of them, by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(_table).order_by(_table.c.name)).mappings()
            return [_learning(row) for row in rows]

    def _note(self, connection: sa.Connection, name: str, note: Note) -> None:
        audit.append(
            connection, at=self._clock(), who=note.who, what=note.what, subject=subject(name), why=note.why
        )


def _check_tiers(connection: sa.Connection, name: str, tiers: Iterable[str]) -> None:
    """Refuse tiers that another learning has; whoever writes is alone, so that two cannot pass at once."""
    others = sa.select(_table.c.name, _table.c.config).where(_table.c.name != name).order_by(_table.c.name)
    for other, config in connection.execute(others):
        if both := sorted({*tiers} & config.get("tiers", {}).keys()):
            raise UserError(
                f"learning {name}: tier {both[0]!r} is that of learning {other} already, and its devices run "
                f"one model; take other tiers, or remove that one: fedge-server learn rm {other}"
            )


def _read(connection: sa.Connection, name: str) -> Learning | None:
    row = connection.execute(sa.select(_table).where(_table.c.name == name)).mappings().first()
    return _learning(row) if row else None


def _required(connection: sa.Connection, name: str) -> Learning:
    found = _read(connection, name) if storable(name) else None
    if found is None:
        known = ", ".join(connection.scalars(sa.select(_table.c.name).order_by(_table.c.name))) or "none"
        raise UserError(f"learning {name[:64]!r}: there is none; learnings: {known}")
    return found


def _learning(row: Mapping[Any, Any]) -> Learning:
    terms, state = Terms.from_mapping(row["terms"]), State.from_json(row["state"])
    return Learning(row["name"], row["task"], row["config"], terms, state)


def _last_cycle(connection: sa.Connection, name: str) -> int:
    """The highest number that a run of this name has."""
    begins = f"{name}-"
    query = sa.select(_runs.c.id).where(_runs.c.id.startswith(begins, autoescape=True))
    numbers = [each.removeprefix(begins) for each in connection.scalars(query)]
    return max((int(each) for each in numbers if each.isascii() and each.isdigit()), default=0)
