"""Windows in the database: each counts once, is bounded, and moves the watch of its tier and release.

Taking a window is one transaction: it is there with what it changed in the watch, or neither is, so that a
killed server goes on from the database. A window that is none is refused with its reason and spoils no
other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import sqlalchemy as sa

from fedge.errors import FormatError, UserError
from fedge.telemetry.reference import Reference
from fedge.telemetry.window import MAX_WINDOWS, Window
from fedge_server.drift import watch as drift
from fedge_server.drift.scores import Shapes
from fedge_server.drift.watch import Track, Watch, observe
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, writing
from fedge_server.telemetry.summary import Summary

References = Callable[[str, int], Reference | None]
"""By tier and version; None: the release has none."""

_windows, _watches, _tracks = schema.telemetry_windows, schema.drift_watches, schema.drift_tracks
_AT_ONCE: Final = 500  # rows that are read together
_AHEAD: Final = 4  # slots by which a device may be ahead of the server's clock


@dataclass(frozen=True, slots=True)
class Settings:
    """How long telemetry is kept, and how drift is looked for.

    Raises:
        UserError: a number is out of range.
    """

    keep_s: float = 90 * 86_400.0  # from when a window came
    most_windows: int = 2400  # of a device; of more the oldest go
    least_period_s: int = 60  # shorter windows are refused
    watch_period_s: float = 3600.0  # in which false alarms are counted
    drift: drift.Settings = field(default_factory=drift.Settings)

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        for name in ("keep_s", "watch_period_s"):
            if not 0 < getattr(self, name) < 1e10:
                raise UserError(f"telemetry: {name} = {getattr(self, name):g}: must be above 0")
        for name in ("most_windows", "least_period_s"):
            if getattr(self, name) < 1:
                raise UserError(f"telemetry: {name} = {getattr(self, name)}: must be 1 or more")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a window."""

    kind: Literal["counted", "known", "refused"]
    reason: str = ""  # of a refusal


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose windows they are, as the server knows."""

    device: str  # id, from its certificate
    tier: str
    tags: tuple[str, ...] = ()


class Telemetry:
    """Takes, keeps and adds up windows; safe to use from several processes.

    Args:
        engine: of the registry.
        settings: of what is kept.
        references: what releases' inputs looked like.
        now: Unix seconds.
    """

    def __init__(
        self,
        engine: sa.Engine,
        settings: Settings | None = None,
        references: References = lambda *_: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._settings = engine, settings or Settings()
        self._references, self._now = references, now

    def take(self, sender: Sender, windows: Sequence[bytes]) -> list[Outcome]:
        """Take what a device sent; an outcome for each, in their order.

        Raises:
            FormatError: there are too many of them.
        """
        if len(windows) > MAX_WINDOWS:
            raise FormatError(f"telemetry: {len(windows)} windows at once are more than {MAX_WINDOWS}")
        return [self._take(sender, data) for data in windows]

    def watch(self, tier: str, version: int) -> Watch:
        """What is known of drift in a tier under a release."""
        with reading(self._engine) as connection:
            return _watch(connection, tier, version)

    def places(self) -> list[tuple[str, int]]:
        """Tiers and releases that windows are kept of, in order."""
        query = sa.select(_windows.c.tier, _windows.c.version).distinct()
        with reading(self._engine) as connection:
            return sorted((str(tier), int(version)) for tier, version in connection.execute(query))

    def summary(
        self, tier: str, version: int, *, tag: str | None = None, since: float = 0.0, until: float = 1e12
    ) -> Summary | None:
        """The sum of a tier's windows under a release; None: there is none.

        Args:
            tier: of the devices.
            version: that answered.
            tag: only devices that had it.
            since: only windows that came at or after this (Unix seconds).
            until: and before this.
        """
        return Summary.of(self.windows(tier, version, tag=tag, since=since, until=until))

    def windows(
        self, tier: str, version: int, *, tag: str | None = None, since: float = 0.0, until: float = 1e12
    ) -> Iterator[tuple[str, Window]]:
        """Device and window, the oldest slot first; read as they are taken, so that memory does not grow."""
        query = (
            sa.select(_windows.c.device_id, _windows.c.tags, _windows.c.body)
            .where(_windows.c.tier == tier, _windows.c.version == version)
            .where(_windows.c.received >= since, _windows.c.received < until)
            .order_by(_windows.c.slot, _windows.c.device_id)
            .execution_options(yield_per=_AT_ONCE)
        )
        with reading(self._engine) as connection:
            for device, tags, body in connection.execute(query):
                if tag is None or tag in tags:
                    yield device, Window.from_bytes(body)

    def prune(self) -> int:
        """Drop what is older than is kept, and what is known of drift under releases without a window.

        Returns:
            How many windows.
        """
        before = self._now() - self._settings.keep_s
        with writing(self._engine) as connection:
            count = connection.execute(_windows.delete().where(_windows.c.received < before)).rowcount
            used = sa.select(_windows.c.version)
            for table in (_watches, _tracks):
                connection.execute(table.delete().where(table.c.version.not_in(used)))
        return int(count)

    def forget(self, device: str) -> int:
        """Drop all that a device has sent; how many windows. What it has moved in a watch stays."""
        with writing(self._engine) as connection:
            connection.execute(_tracks.delete().where(_tracks.c.device_id == device))
            return int(connection.execute(_windows.delete().where(_windows.c.device_id == device)).rowcount)

    def _take(self, sender: Sender, data: bytes) -> Outcome:
        try:
            window = Window.from_bytes(data)
            self._check(sender, window)
        except FormatError as error:
            return Outcome("refused", str(error))
        with writing(self._engine) as connection:
            same = (_windows.c.device_id == sender.device, _windows.c.slot == window.slot)
            if connection.scalar(sa.select(_windows.c.slot).where(*same)) is not None:
                return Outcome("known")
            releases = schema.releases.c.version
            if connection.scalar(sa.select(releases).where(releases == window.version)) is None:
                return Outcome("refused", f"telemetry: there is no release {window.version}")
            self._keep(connection, sender, window, data)
            self._observe(connection, sender, window)
        return Outcome("counted")

    def _check(self, sender: Sender, window: Window) -> None:
        """Against the server's clock, rules and reference.

        Raises:
            FormatError: it does not hold.
        """
        if window.period_s < self._settings.least_period_s:
            raise FormatError(
                f"telemetry: windows of {window.period_s} s are shorter than {self._settings.least_period_s}"
            )
        slot = self._now() / window.period_s
        if window.slot > slot + _AHEAD:
            raise FormatError("telemetry: the window lies in the future; set the device's clock")
        if (slot - window.slot) * window.period_s > self._settings.keep_s:
            raise FormatError("telemetry: the window is older than is kept")
        known = self._references(sender.tier, window.version)
        if window.reference and known is None:
            raise FormatError(
                f"telemetry: the reference of release {window.version} is not here, or not kept any more"
            )
        if known is not None and window.reference not in ("", known.digest):
            raise FormatError("telemetry: inputs were counted by another reference than the release's")
        if known is not None and len(window.sketch.answers) != len(known.answers):
            raise FormatError(
                f"telemetry: {len(window.sketch.answers)} classes, and the release has {len(known.answers)}"
            )

    def _keep(self, connection: sa.Connection, sender: Sender, window: Window, data: bytes) -> None:
        own = _windows.c.device_id == sender.device
        values: dict[str, Any] = {"device_id": sender.device, "slot": window.slot, "tier": sender.tier}
        connection.execute(
            _windows.insert().values(
                version=window.version, tags=list(sender.tags), received=self._now(), body=data, **values
            )
        )
        newest = (
            sa.select(_windows.c.slot).where(own).order_by(_windows.c.slot.desc())
            .offset(self._settings.most_windows).limit(1)
        )  # fmt: skip
        last = connection.scalar(newest)
        if last is not None:
            connection.execute(_windows.delete().where(own, _windows.c.slot <= last))

    def _observe(self, connection: sa.Connection, sender: Sender, window: Window) -> None:
        reference = self._references(sender.tier, window.version) if window.reference else None
        before = _watch(connection, sender.tier, window.version), _track(connection, sender, window.version)
        watch, track = observe(
            self._settings.drift,
            *before,
            period=int(self._now() // self._settings.watch_period_s),
            slot=window.slot,
            window=Shapes.of(window.sketch),
            reference=None if reference is None else Shapes.of(reference),
        )
        if (watch, track) == before:
            return
        _write(connection, _watches, {"tier": sender.tier, "version": window.version}, watch.to_json())
        _write(connection, _tracks, {"device_id": sender.device, "version": window.version}, track.to_json())


def _watch(connection: sa.Connection, tier: str, version: int) -> Watch:
    query = sa.select(_watches.c.state).where(_watches.c.tier == tier, _watches.c.version == version)
    state = connection.scalar(query)
    return Watch() if state is None else Watch.from_json(state)


def _track(connection: sa.Connection, sender: Sender, version: int) -> Track:
    query = sa.select(_tracks.c.state).where(
        _tracks.c.device_id == sender.device, _tracks.c.version == version
    )
    state = connection.scalar(query)
    return Track() if state is None else Track.from_json(state)


def _write(connection: sa.Connection, table: sa.Table, key: dict[str, Any], state: Any) -> None:
    where = [table.c[name] == value for name, value in key.items()]
    if not connection.execute(table.update().where(*where).values(state=state)).rowcount:
        connection.execute(table.insert().values(state=state, **key))
