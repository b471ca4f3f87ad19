"""Rollouts over the registry: each method is one transaction, so that a server killed at any moment goes on.

What happened, what it changed and its entry in the audit trail are committed together or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import sqlalchemy as sa

from fedge.errors import TrustError, UserError
from fedge.files import sha256
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.devices import ACTIVE
from fedge_server.registry.engine import reading, storable, writing
from fedge_server.rollout import audit, fleet, records
from fedge_server.rollout.assignment import Channel, offered, stage_of
from fedge_server.rollout.deciding import check_start, decide
from fedge_server.rollout.plan import Plan
from fedge_server.rollout.records import Standing
from fedge_server.rollout.reports import Change, Report, changes
from fedge_server.rollout.state import (
    OVER,
    Action,
    Event,
    Note,
    Paused,
    RaiseFloor,
    Replaced,
    Resumed,
    RollbackOrdered,
    SetBase,
    Signed,
    Started,
    State,
    Status,
    Superseded,
    Tallied,
    TimePassed,
)

Clock = Callable[[], float]
"""Unix seconds."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an offer to a device rests on."""

    channel: Channel
    rollout: State | None
    stage: int | None  # of the device in the rollout
    known: bool  # it was offered the rollout's version before


class Rollouts:
    """The rollouts of a registry."""

    def __init__(self, registry: Registry, clock: Clock = time.time) -> None:
        self._engine, self._clock = registry.engine, clock

    def start(
        self,
        version: int,
        tier: str,
        plan: Plan | None = None,
        *,
        who: str,
        why: str = "",
        signed: bool = True,
    ) -> State:
        """Begin to bring a release to a tier.

        Args:
            version: of a release that holds a variant for the tier.
            tier: a class of devices.
            plan: None: `fleet.default_plan`.
            who: begins it.
            why: in their words.
            signed: False: it waits for `signed`.

        Raises:
            UserError: the release, the tier or the plan cannot be used, or another rollout is in the way.
        """
        with writing(self._engine) as connection:
            return self.start_within(connection, version, tier, plan, who=who, why=why, signed=signed)

    def start_within(
        self,
        connection: sa.Connection,
        version: int,
        tier: str,
        plan: Plan | None = None,
        *,
        who: str,
        why: str = "",
        signed: bool = True,
    ) -> State:
        """As `start`, within a transaction of its caller; nothing is written before it could be refused."""
        now = self._clock()
        fleet.check_variant(connection, version, tier)
        fleet.check_kept(connection, version, tier)
        channel = records.read_channel(connection, tier)
        newest = channel.rollout and records.read_rollout(connection, channel.rollout)
        check_start(version, channel.floor, newest or None)
        rollout_id = f"{tier}-{version}"
        plan = fleet.fitted(connection, plan, rollout_id, version, tier)
        status = Status.PENDING if signed else Status.AWAITING_SIGNATURE
        state = State(rollout_id, tier, version, channel.base, plan, status, at=now)
        if newest:
            self._happened(connection, newest, Superseded(version, who))
        records.add_rollout(connection, state, now)
        records.write_channel(connection, replace(channel, rollout=state.id))
        digest = sha256(json.dumps(plan.to_json(), sort_keys=True).encode())
        self._note(connection, state.id, Note(who, "planned", f"{why} (plan {digest})".strip()), now)
        return self._begun(connection, state, Started(who, why)) if signed else state

    def signed(self, rollout_id: str, *, who: str) -> State:
        """Begin a rollout whose release was waiting for its signature."""
        with writing(self._engine) as connection:
            pending = self._happened(connection, self._required(connection, rollout_id), Signed(who))
            return self._begun(connection, pending, Started(who))

    def pause(self, rollout_id: str, *, who: str, why: str) -> State:
        """Offer the version to no further device for now; evidence can still halt it."""
        return self._do(rollout_id, Paused(who, why))

    def resume(self, rollout_id: str, *, who: str, why: str, override: bool = False) -> State:
        """Let a paused rollout go on; or a halted one, by an override and a reason: it is judged anew."""
        return self._do(rollout_id, Resumed(who, why, override))

    def rollback(self, rollout_id: str, *, who: str, why: str) -> State:
        """Order the way back: the content of the release before is wanted under a new version.

        Raises:
            UserError: its state does not allow it, or a newer rollout of its tier does not.
        """
        with writing(self._engine) as connection:
            state = self._required(connection, rollout_id)
            newest = records.read_channel(connection, state.tier).rollout
            if newest != state.id:
                raise UserError(
                    f"rollout {state.id}: {newest} came after it in tier {state.tier!r}; roll that one back, "
                    "or publish what you want back: fedge-server release publish --again VERSION"
                )
            return self._happened(connection, state, RollbackOrdered(who, why))

    def replaced(self, rollout_id: str, version: int, *, who: str) -> State:
        """The old content is published under a new version: all devices get that, and the floor rises to it.

        Raises:
            UserError: the release is not there, not newer, or holds other content.
        """
        with writing(self._engine) as connection:
            state = self._required(connection, rollout_id)
            fleet.check_same_content(connection, state, version)
            return self._happened(connection, state, Replaced(version, who))

    def get(self, rollout_id: str) -> State:
        """One rollout.

        Raises:
            UserError: there is none of this id.
        """
        with reading(self._engine) as connection:
            return self._required(connection, rollout_id)

    def all(self) -> list[State]:
        """All rollouts, oldest first."""
        with reading(self._engine) as connection:
            return records.read_rollouts(connection)

    def newest(self) -> list[State]:
        """The newest rollout of each tier: no other one is under way."""
        with reading(self._engine) as connection:
            return records.read_newest(connection)

    def channel(self, tier: str) -> Channel:
        """Where a tier stands."""
        with reading(self._engine) as connection:
            return records.read_channel(connection, tier)

    def standing(self) -> dict[str, Standing]:
        """What offers to each tier's devices rest on, apart from the devices: equal values, equal offers."""
        with reading(self._engine) as connection:
            return records.read_standing(connection)

    def tick(self) -> list[State]:
        """Let time do what it does; devices that ask or report do so too. Returns the rollouts under way."""
        with writing(self._engine) as connection:
            under_way = [state for state in records.read_newest(connection) if state.status not in OVER]
            return [self._happened(connection, state, TimePassed()) for state in under_way]

    def offer(self, device: str, has: int = 0, tags: Collection[str] = ()) -> int | None:
        """The version that a device shall install, above the one it has; None: none. Reads rows by key.

        Raises:
            TrustError: the device is not enrolled, or revoked.
        """
        with reading(self._engine) as connection:
            seen = self._look(connection, device, tags)
            due = seen.rollout is not None and seen.rollout.due is not None
            answer = offered(seen.channel, seen.rollout, seen.stage, has)
            new = seen.rollout is not None and answer == seen.rollout.version and not seen.known
        if not new and not (due and seen.rollout and self._clock() >= (seen.rollout.due or 0)):
            return answer
        with writing(self._engine) as connection:  # it may have been halted meanwhile: look again
            return self._offer(connection, device, has, tags)

    def note(self, report: Report) -> bool:
        """Take a device's report; False: it was known already, and changes nothing.

        Raises:
            TrustError: the device is not enrolled or revoked, or reports of what it was never offered.
        """
        with writing(self._engine) as connection:
            tier = _tier(connection, report.device)
            try:
                fleet.check_variant(connection, report.version, tier)
            except UserError as error:
                raise TrustError(f"report of device {report.device[:8]}: {error}") from error
            known = records.reported(connection, report.device, report.version)
            if report.kind in known or fleet.is_retired(connection, report.version, tier):
                return False  # of one that is not kept it is not known who has said what
            rollout = records.read_rollout(connection, f"{tier}-{report.version}")
            if rollout is not None:
                self._count(connection, rollout, report, known)
            records.add_report(connection, report, self._clock())
            if report.kind == "installed":
                self._leave(connection, tier, report)
            return True

    def _begun(self, connection: sa.Connection, state: State, event: Started) -> State:
        """Begin, and count what devices have reported before: none of it is said twice.

        Devices of a tier that never had a rollout take its newest release as soon as it is published.
        """
        after = self._happened(connection, state, event)
        if after.base:
            return after  # else it was offered to nobody
        known: dict[str, set[str]] = {}
        for report in records.read_reports(connection, after.tier, after.version):
            self._add(connection, after, report, known.setdefault(report.device, set()))
            known[report.device].add(report.kind)
        if not known:
            return after
        return self._happened(connection, after, Tallied(records.read_tallies(connection, after.id)))

    def _count(self, connection: sa.Connection, rollout: State, report: Report, known: set[str]) -> None:
        self._add(connection, rollout, report, known)
        self._happened(connection, rollout, Tallied(records.read_tallies(connection, rollout.id)))

    def _add(self, connection: sa.Connection, rollout: State, report: Report, known: set[str]) -> None:
        progress = records.read_progress(connection, rollout.id, report.device)
        if progress is None:
            # Of what all may have, devices need no row before; nor of a tier's first rollout, before which
            # its devices took the newest release without being asked to.
            if rollout.status is not Status.DONE and rollout.base:
                raise TrustError(
                    f"report of device {report.device[:8]}: version {report.version} was not offered to it"
                )
            last = records.Progress(len(rollout.plan.stages) - 1, records.OFFERED)
            records.add_progress(connection, rollout.id, report.device, progress=last, at=self._clock())
        if report.kind == "installed":
            records.write_progress(connection, rollout.id, report.device, records.INSTALLED)
        before = records.confidence_before(connection, report.device, report.version, rollout.base)
        records.count(connection, rollout.id, changes(report, rollout.plan, known, before))

    def _leave(self, connection: sa.Connection, tier: str, report: Report) -> None:
        """Count a device that has left a bad version for the one that took its place."""
        channel = records.read_channel(connection, tier)
        rollout = channel.rollout and records.read_rollout(connection, channel.rollout)
        if not rollout or rollout.replacement != report.version:
            return
        progress = records.read_progress(connection, rollout.id, report.device)
        if progress is not None and progress.state == records.INSTALLED:
            records.write_progress(connection, rollout.id, report.device, records.LEFT)
            records.count(connection, rollout.id, [Change(records.LEFT, 1, 0)])
            self._happened(connection, rollout, Tallied(records.read_tallies(connection, rollout.id)))

    def _offer(self, connection: sa.Connection, device: str, has: int, tags: Collection[str]) -> int | None:
        seen = self._look(connection, device, tags)
        if seen.rollout is not None and seen.rollout.status not in OVER:
            self._happened(connection, seen.rollout, TimePassed())
            seen = self._look(connection, device, tags)
        answer, rollout, stage = (
            offered(seen.channel, seen.rollout, seen.stage, has),
            seen.rollout,
            seen.stage,
        )
        if rollout is not None and stage is not None and answer == rollout.version and not seen.known:
            progress = records.Progress(stage, records.OFFERED)
            records.add_progress(connection, rollout.id, device, progress=progress, at=self._clock())
        return answer

    def _look(self, connection: sa.Connection, device: str, tags: Collection[str]) -> _Seen:
        channel = records.read_channel(connection, _tier(connection, device))
        rollout = records.read_rollout(connection, channel.rollout) if channel.rollout else None
        if rollout is None:
            return _Seen(channel, None, None, known=False)
        progress = records.read_progress(connection, rollout.id, device)
        now = stage_of(rollout.plan, rollout.id, device, tags)
        stages = [stage for stage in (progress.stage if progress else None, now) if stage is not None]
        return _Seen(channel, rollout, min(stages, default=None), known=progress is not None)

    def _do(self, rollout_id: str, event: Event) -> State:
        with writing(self._engine) as connection:
            return self._happened(connection, self._required(connection, rollout_id), event)

    def _happened(self, connection: sa.Connection, before: State, event: Event) -> State:
        """Decide, and write down all that follows."""
        now = self._clock()
        after, actions = decide(before, event, now)
        if replace(after, at=before.at, tallies=before.tallies) != before:
            records.write_state(connection, after)
        for action in actions:
            self._apply(connection, after, action, now)
        return after

    def _apply(self, connection: sa.Connection, state: State, action: Action, now: float) -> None:
        if isinstance(action, Note):
            self._note(connection, state.id, action, now)
        elif isinstance(action, SetBase | RaiseFloor):
            channel = records.read_channel(connection, state.tier)
            if channel.rollout == state.id:  # else a newer rollout's word counts
                records.write_channel(connection, _moved(channel, action))
        # Republish is left to whoever can sign: a state says that it is wanted, see `wanted_content`.

    def _note(self, connection: sa.Connection, subject: str, note: Note, now: float) -> None:
        audit.append(connection, at=now, who=note.who, what=note.what, subject=subject, why=note.why)

    def _required(self, connection: sa.Connection, rollout_id: str) -> State:
        found = records.read_rollout(connection, rollout_id) if storable(rollout_id) else None
        if found is None:
            raise UserError(
                f"rollout {rollout_id!r}: there is none; list them with: fedge-server rollout status"
            )
        return found


def wanted_content(state: State) -> int | None:
    """The version whose content is to be signed under a new one above the rollout's; None: none is."""
    awaits = state.status is Status.AWAITING_SIGNATURE and state.going_back
    return state.base if awaits else None


def _moved(channel: Channel, action: SetBase | RaiseFloor) -> Channel:
    if isinstance(action, SetBase):
        return replace(channel, base=action.version)
    return replace(channel, floor=max(channel.floor, action.version))


def _tier(connection: sa.Connection, device: str) -> str:
    """The tier of a device that may connect.

    Raises:
        TrustError: it is not enrolled, or revoked.
    """
    table = schema.devices
    query = sa.select(table.c.tier, table.c.status).where(table.c.id == device)
    row = connection.execute(query).first() if storable(device) else None
    if row is None:
        raise TrustError(f"device {device[:8]!r}: is not enrolled")
    if row.status != ACTIVE:
        raise TrustError(f"device {device[:8]}: is revoked")
    return str(row.tier)
