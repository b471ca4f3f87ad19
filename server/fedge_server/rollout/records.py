"""Rows of rollouts, to values and back; every function works within a transaction of its caller."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import sqlalchemy as sa

from fedge.telemetry.sketch import CONFIDENCE_BINS
from fedge.telemetry.window import Window
from fedge_server.registry import schema
from fedge_server.rollout.assignment import Channel
from fedge_server.rollout.evidence import Tally
from fedge_server.rollout.plan import Plan
from fedge_server.rollout.reports import CONFIDENCE, Change, Report
from fedge_server.rollout.state import State, Tallies

OFFERED, INSTALLED, LEFT = "offered", "installed", "left"

_rollouts, _tiers, _devices = schema.rollouts, schema.rollout_tiers, schema.rollout_devices
_reports, _tallies = schema.rollout_reports, schema.rollout_tallies
_windows = schema.telemetry_windows
_LATELY: Final = 5  # windows
_LEAST_ANSWERS: Final = 30  # in them together


@dataclass(frozen=True, slots=True)
class Progress:
    """One device in one rollout."""

    stage: int  # from 0
    state: str  # offered, installed, left


@dataclass(frozen=True, slots=True)
class Standing:
    """A tier's channel, and how far its newest rollout has come."""

    channel: Channel
    status: str = ""  # of the rollout; empty: there never was one
    stage: int = -1


def read_standing(connection: sa.Connection) -> dict[str, Standing]:
    """Where every tier stands that ever had a rollout; plans and counts are not read."""
    query = sa.select(_tiers, _rollouts.c.state).outerjoin(_rollouts, _tiers.c.rollout == _rollouts.c.id)
    found = {}
    for row in connection.execute(query).mappings():
        channel = Channel(row["tier"], row["base"], row["floor"], row["rollout"])
        state = row["state"] or {"status": "", "stage": -1}
        found[channel.tier] = Standing(channel, state["status"], state["stage"])
    return found


def read_channel(connection: sa.Connection, tier: str) -> Channel:
    """Where a tier stands; one that never had a rollout stands at nothing."""
    row = connection.execute(sa.select(_tiers).where(_tiers.c.tier == tier)).mappings().first()
    return Channel(**row) if row else Channel(tier)


def write_channel(connection: sa.Connection, channel: Channel) -> None:
    """Make or change a tier's row; its floor never falls, whoever wrote it meanwhile."""
    values = {"base": channel.base, "rollout": channel.rollout}
    where = _tiers.c.tier == channel.tier
    raised = sa.case((_tiers.c.floor < channel.floor, channel.floor), else_=_tiers.c.floor)
    changed = connection.execute(_tiers.update().where(where).values(floor=raised, **values))
    if not changed.rowcount:
        connection.execute(_tiers.insert().values(tier=channel.tier, floor=channel.floor, **values))


def read_rollout(connection: sa.Connection, rollout_id: str) -> State | None:
    """A rollout with its plan and its counts."""
    row = connection.execute(sa.select(_rollouts).where(_rollouts.c.id == rollout_id)).mappings().first()
    return _state(connection, row) if row else None


def read_rollouts(connection: sa.Connection) -> list[State]:
    """All rollouts, oldest first."""
    query = sa.select(_rollouts).order_by(_rollouts.c.created, _rollouts.c.id)
    return [_state(connection, row) for row in connection.execute(query).mappings().all()]


def read_newest(connection: sa.Connection) -> list[State]:
    """The newest rollout of each tier: no other one is under way."""
    query = sa.select(_rollouts).join(_tiers, _tiers.c.rollout == _rollouts.c.id).order_by(_rollouts.c.id)
    return [_state(connection, row) for row in connection.execute(query).mappings().all()]


def add_rollout(connection: sa.Connection, state: State, created: float) -> None:
    """Write a new rollout down."""
    connection.execute(
        _rollouts.insert().values(
            id=state.id,
            tier=state.tier,
            version=state.version,
            plan=state.plan.to_json(),
            state=state.to_json(),
            created=created,
        )
    )


def write_state(connection: sa.Connection, state: State) -> None:
    """Change a rollout's state."""
    connection.execute(_rollouts.update().where(_rollouts.c.id == state.id).values(state=state.to_json()))


def read_progress(connection: sa.Connection, rollout_id: str, device: str) -> Progress | None:
    """Where a device stands in a rollout; None: it was never offered the version."""
    query = sa.select(_devices.c.stage, _devices.c.state).where(*_of(_devices, rollout_id, device))
    row = connection.execute(query).mappings().first()
    return Progress(**row) if row else None


def add_progress(
    connection: sa.Connection, rollout_id: str, device: str, *, progress: Progress, at: float
) -> None:
    """Write down that a device is offered the version."""
    connection.execute(
        _devices.insert().values(
            rollout_id=rollout_id, device_id=device, stage=progress.stage, state=progress.state, offered=at
        )
    )


def write_progress(connection: sa.Connection, rollout_id: str, device: str, state: str) -> None:
    """Change how far a device has come."""
    where = _of(_devices, rollout_id, device)
    connection.execute(_devices.update().where(*where).values(state=state))


def reported(connection: sa.Connection, device: str, version: int) -> set[str]:
    """Kinds that a device has reported of a version."""
    query = sa.select(_reports.c.kind).where(_reports.c.device_id == device, _reports.c.version == version)
    return set(connection.scalars(query))


def confidence_before(connection: sa.Connection, device: str, version: int, base: int) -> float | None:
    """A device's confidence before a version: in its newest windows under the base, else as it reported it.

    A report is made once, early in a version's life. If the world has changed since, which is why the new
    version may be there at all, windows say how sure the old one is now, and the new one may well be surer
    than that and less sure than the old one once was. Windows with noise are left out.
    """
    return _told_lately(connection, device, base) or _reported_before(connection, device, version)


def _told_lately(connection: sa.Connection, device: str, version: int) -> float | None:
    """Mean confidence over a device's newest windows under a version; None: they hold too few answers."""
    query = (
        sa.select(_windows.c.body)
        .where(_windows.c.device_id == device, _windows.c.version == version)
        .order_by(_windows.c.slot.desc())
        .limit(_LATELY)
    )
    windows = [Window.from_bytes(body) for body in connection.scalars(query)]
    counts = sum((each.sketch.confidence for each in windows if not each.epsilon), np.zeros(CONFIDENCE_BINS))
    middles = (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    return float(counts @ middles / counts.sum()) if counts.sum() >= _LEAST_ANSWERS else None


def _reported_before(connection: sa.Connection, device: str, version: int) -> float | None:
    """What it reported under the newest version before this one of which it has sent any."""
    query = (
        sa.select(_reports.c.value)
        .where(_reports.c.device_id == device, _reports.c.kind == CONFIDENCE, _reports.c.version < version)
        .order_by(_reports.c.version.desc())
        .limit(1)
    )
    found = connection.scalar(query)
    return None if found is None else float(found)


def read_reports(connection: sa.Connection, tier: str, version: int) -> list[Report]:
    """What a tier's devices have reported of a version, oldest first."""
    devices = schema.devices.c
    query = (
        sa.select(_reports.c.device_id, _reports.c.kind, _reports.c.value)
        .join(schema.devices, devices.id == _reports.c.device_id)
        .where(_reports.c.version == version, devices.tier == tier)
        .order_by(_reports.c.reported, _reports.c.device_id, _reports.c.kind)
    )
    return [Report(device, version, kind, value) for device, kind, value in connection.execute(query)]


def add_report(connection: sa.Connection, report: Report, at: float) -> None:
    """Write a report down; the caller knows that it is new."""
    connection.execute(
        _reports.insert().values(
            device_id=report.device, version=report.version, kind=report.kind, value=report.value, reported=at
        )
    )


def count(connection: sa.Connection, rollout_id: str, changes: Iterable[Change]) -> None:
    """Add to a rollout's counts."""
    for change in changes:
        where = (_tallies.c.rollout_id == rollout_id, _tallies.c.name == change.name)
        more = {"judged": _tallies.c.judged + change.judged, "bad": _tallies.c.bad + change.bad}
        changed = connection.execute(_tallies.update().where(*where).values(**more))
        if not changed.rowcount:
            values: dict[str, Any] = {"judged": change.judged, "bad": change.bad}
            connection.execute(_tallies.insert().values(rollout_id=rollout_id, name=change.name, **values))


def read_tallies(connection: sa.Connection, rollout_id: str) -> Tallies:
    """A rollout's counts."""
    query = sa.select(_tallies).where(_tallies.c.rollout_id == rollout_id)
    found = {row["name"]: Tally(row["judged"], row["bad"]) for row in connection.execute(query).mappings()}
    installed, left = (found.pop(name, Tally()).judged for name in (INSTALLED, LEFT))
    return Tallies(found, installed, left)


def _state(connection: sa.Connection, row: Any) -> State:
    return State.from_json(row["state"], Plan.from_mapping(row["plan"]), read_tallies(connection, row["id"]))


def _of(table: sa.Table, rollout_id: str, device: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.rollout_id == rollout_id, table.c.device_id == device
