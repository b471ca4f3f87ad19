"""What the decision rests on, read from the database, and the decision written down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from fedge_server.continual.learnings import run_of
from fedge_server.continual.state import Status as Learning
from fedge_server.registry import schema
from fedge_server.registry.devices import ACTIVE
from fedge_server.registry.living import OVER, Retired
from fedge_server.retention.rule import Facts, Keep
from fedge_server.rollout import audit
from fedge_server.rollout.state import OVER as ENDED

_RELEASE: Final = re.compile(r"release:([1-9]\d{0,14})")
_variants, _drafted, _drafts = schema.variants.c, schema.draft_variants.c, schema.drafts.c
_runs, _devices, _reports = schema.runs.c, schema.devices.c, schema.rollout_reports.c
_windows, _learnings = schema.telemetry_windows.c, schema.learnings.c


def facts(connection: sa.Connection, keep: Keep, now: float) -> Facts:
    """All of them, as of the connection's transaction; `now` in Unix seconds."""
    kept = sa.select(_variants.release, _variants.tier)
    kept = kept.where(_variants.retired.is_(None), _variants.golden != "")  # of the first fedge none has any
    refused = (
        sa.select(_drafted.draft, _drafted.tier)
        .join(schema.drafts, _drafts.id == _drafted.draft)
        .where(_drafted.status == "refused", _drafted.retired.is_(None))
        .order_by(_drafts.created.desc(), _drafts.id)
    )
    over = (
        sa.select(_runs.id)
        .where(_runs.status.in_(OVER), _runs.retired.is_(None))
        .order_by(_runs.created.desc(), _runs.id.desc())
    )
    beginnings = set(_beginnings(connection))
    running = _pairs(connection, _reported(now - keep.unseen_s))
    running |= _pairs(connection, _reported(now - keep.unseen_s, ~_is_bad()))
    return Facts(
        variants=_pairs(connection, kept),
        rolling=frozenset(_rolling(connection)),
        running=running | _pairs(connection, _told(kept)),
        named=frozenset(int(match[1]) for each in beginnings if (match := _RELEASE.fullmatch(each))),
        refused=tuple((row.draft, row.tier) for row in connection.execute(refused)),
        over=tuple(connection.scalars(over)),
        busy=frozenset({*_busy(connection), *_runs_in(beginnings)}),
    )


def write(connection: sa.Connection, retired: Retired, *, who: str, now: float) -> None:
    """Write down what is not kept any more; lineage stays, and the audit trail says who has decided it."""
    for version, tier in sorted(retired.variants):
        _set(connection, schema.variants, now, release=version, tier=tier)
    for draft, tier in sorted(retired.drafts):
        _set(connection, schema.draft_variants, now, draft=draft, tier=tier)
    for run in sorted(retired.runs):
        _set(connection, schema.runs, now, id=run)
    for line in retired.lines():
        subject, _, why = line.partition(": ")
        audit.append(connection, at=now, who=who, what="bytes no longer kept", subject=subject, why=why)


def _set(connection: sa.Connection, table: sa.Table, now: float, **key: Any) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    connection.execute(table.update().where(*where).values(retired=now))


def _pairs(connection: sa.Connection, query: sa.Select[Any]) -> frozenset[tuple[int, str]]:
    return frozenset((int(version), str(tier)) for version, tier in connection.execute(query))


def _rolling(connection: sa.Connection) -> Iterator[tuple[int, str]]:
    """What all of a tier may have, and both ends of rollouts: a newest one that is over can still go back."""
    channels, rollouts = schema.rollout_tiers.c, schema.rollouts.c
    newest = set()
    for tier, base, rollout in connection.execute(sa.select(channels.tier, channels.base, channels.rollout)):
        newest.add(rollout)
        yield base, tier
    for name, tier, state in connection.execute(sa.select(rollouts.id, rollouts.tier, rollouts.state)):
        if name in newest or state["status"] not in ENDED:
            yield from ((state[key] or 0, tier) for key in ("version", "base", "replacement"))


def _is_bad() -> sa.Exists:
    """Whether a report's device has said that this version works badly: it may have gone back by itself."""
    other = schema.rollout_reports.alias()
    same = (other.c.device_id == _reports.device_id) & (other.c.version == _reports.version)
    return sa.exists().where(same, other.c.kind == "unhealthy")


def _reported(since: float, *which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """What devices that were seen since then have installed last, of `which`, as far as they have said it."""
    newest = (
        sa.select(sa.func.max(_reports.version))
        .where(_reports.device_id == _devices.id, _reports.kind == "installed", *which)
        .scalar_subquery()
    )
    seen = sa.func.coalesce(_devices.last_seen, _devices.enrolled) >= since
    found = sa.select(sa.func.coalesce(newest, 0), _devices.tier)
    return found.where(_devices.status == ACTIVE, seen).distinct()


def _told(kept: sa.Select[Any]) -> sa.Select[Any]:
    """Of these variants, those that windows of telemetry are kept of."""
    windows = sa.exists().where(_windows.tier == _variants.tier, _windows.version == _variants.release)
    return kept.where(windows)


def _beginnings(connection: sa.Connection) -> Iterator[str]:
    """What a run begins with, which may yet begin or be resumed, or a learning: `release:N`, or a path."""
    runs = sa.select(_runs.config).where(_runs.status != "done", _runs.retired.is_(None))
    for query in (runs, sa.select(_learnings.config)):
        for config in connection.scalars(query):
            named = (config.get("model", {}).get(key) for key in ("start", "distil_from"))
            yield from (value for value in named if isinstance(value, str))


def _runs_in(beginnings: Iterable[str]) -> Iterator[str]:
    """Names of what may be runs: of the folder that a path names, and of the one in which its file lies."""
    for path in map(Path, beginnings):
        yield from (path.name, path.parent.name)


def _busy(connection: sa.Connection) -> Iterator[str]:
    waiting = sa.select(_drafts.run_id).join(schema.draft_variants, _drafted.draft == _drafts.id)
    yield from connection.scalars(waiting.where(_drafted.status == "waiting"))
    for name, state in connection.execute(sa.select(_learnings.name, _learnings.state)):
        if state["status"] != Learning.WATCHING:
            yield run_of(name, state["cycle"])
