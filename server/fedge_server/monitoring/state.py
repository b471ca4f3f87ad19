"""Look up what is so now: in the hub's memory, in the database and on the disk, every few seconds at most."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedge import __version__
from fedge.errors import FedgeError
from fedge_server.hub.home import Home
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.monitoring import metrics
from fedge_server.monitoring.metrics import Gauge
from fedge_server.registry import schema
from fedge_server.registry.database import RUN_STATUSES
from fedge_server.registry.devices import ACTIVE
from fedge_server.registry.engine import reading
from fedge_server.release.place import ReleasePlace
from fedge_server.rounds.record import RoundRecord

DATABASE_S: Final = 5.0  # that what the database said is good for
DISK_S: Final = 60.0  # likewise, of sizes and dates
PATIENCE_S: Final = 3.0  # for one of these, within one answer
MAX_FILES: Final = 200_000  # that are counted in one folder; of more the size is left out
FOLDERS: Final = ("store", "repository", "deltas", "exports", "objects", "spool", "runs")

Found = tuple[Gauge, tuple[str, ...], float]
"""A value with the labels of its gauge."""
Last = Mapping[str, tuple[RoundRecord, int]]
"""By run: the last round's record, and how many rounds are planned (0: not known)."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the hub's loop holds, as of one moment."""

    online: Mapping[str, int] = field(default_factory=dict)  # devices by tier
    open: int = 0  # messages
    unsent: int = 0
    commits: int = 0
    polls: int = 0
    streams: int = 0
    workers: int = 0
    offered: Mapping[str, int] = field(default_factory=dict)  # newest version by tier


Look = Callable[[], tuple[Seen, float]]
"""Ask the loop, from a thread: what it holds, and the seconds that it took to answer."""


class State(Collector):
    """All gauges, made anew for each answer.

    Args:
        look: at the hub's loop.
        last: of the runs under way.
        engine: of the registry.
        home: of the server.
    """

    def __init__(self, look: Look, last: Callable[[], Last], engine: sa.Engine, home: Home) -> None:
        self._look, self._last, self._home = look, last, home
        self._database = Kept(DATABASE_S, lambda: list(_database(engine)))
        self._disk = Kept(DISK_S, lambda: list(_disk(engine, home)))

    def describe(self) -> list[GaugeMetricFamily]:
        """What may come, without values: registering asks nobody."""
        return [gauge.family() for gauge in metrics.LOOKED_UP]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Everything that can be found now.

        Raises:
            TimeoutError: the loop does not answer.
        """
        families = {gauge.name: gauge.family() for gauge in metrics.LOOKED_UP}
        seen, delay = self._look()
        found = [*_memory(seen, delay), *_runs(self._last())]
        try:
            found += [*self._database.get(), (metrics.DATABASE_UP, (), 1)]
        except FedgeError:
            found.append((metrics.DATABASE_UP, (), 0))
        with suppress(FedgeError):
            found += self._disk.get()
        for gauge, labels, value in found:
            families[gauge.name].add_metric(labels, value)
        yield from (family for family in families.values() if family.samples)


class Kept:
    """Something that costs, looked up at most every so many seconds, by one thread, whoever asks how often.

    A disk or a database that hangs keeps that thread and nobody else.
    """

    def __init__(
        self, seconds: float, find: Callable[[], list[Found]], patience_s: float = PATIENCE_S
    ) -> None:
        self._seconds, self._find, self._patience_s = seconds, find, patience_s
        self._until, self._found = float("-inf"), list[Found]()
        self._fault: FedgeError | None = None
        self._finding: threading.Thread | None = None
        self._lock = threading.Lock()

    def get(self) -> list[Found]:
        """What was found last.

        Raises:
            FedgeError: it could not be found, or not in time.
        """
        with self._lock:
            if self._finding is None and time.monotonic() >= self._until:
                self._finding = threading.Thread(target=self._run, name="metrics-look", daemon=True)
                self._finding.start()
            finding = self._finding
        if finding is not None:
            finding.join(self._patience_s)
            if finding.is_alive():
                raise FedgeError("metrics: this takes too long now")
        if self._fault is not None:
            raise self._fault
        return self._found

    def _run(self) -> None:
        try:
            self._found, self._fault = self._find(), None
        except FedgeError as error:
            self._fault = error
        except Exception as error:  # noqa: BLE001 - whoever asks is told, and asks again
            self._fault = FedgeError(f"{type(error).__name__}: {error}")
        self._until = time.monotonic() + self._seconds
        self._finding = None


def _memory(seen: Seen, delay: float) -> Iterator[Found]:
    yield metrics.BUILD, (__version__,), 1
    yield metrics.LOOP_DELAY, (), delay
    yield metrics.MESSAGES_OPEN, (), seen.open
    yield metrics.MESSAGES_UNSENT, (), seen.unsent
    yield metrics.COMMITS_WAITING, (), seen.commits
    yield metrics.POLLS_WAITING, (), seen.polls
    yield metrics.STREAMS_OPEN, (), seen.streams
    yield metrics.WORKERS, (), seen.workers
    for tier, count in sorted(seen.online.items()):
        yield metrics.DEVICES_ONLINE, (tier,), count
    for tier, version in sorted(seen.offered.items()):
        yield metrics.RELEASE_VERSION, (tier,), version


def _runs(last: Last) -> Iterator[Found]:
    for run, (record, planned) in sorted(last.items()):
        yield metrics.RUN_ROUND, (run,), record.round
        yield metrics.RUN_ROUNDS, (run,), planned
        yield metrics.RUN_CLIENTS, (run,), record.clients
        yield metrics.RUN_ASKED, (run,), record.asked
        yield metrics.RUN_SECONDS, (run,), record.seconds
        said = {**record.metrics, "epsilon": record.privacy.get("epsilon")}
        named = {
            "loss": metrics.RUN_LOSS,
            "accuracy": metrics.RUN_ACCURACY,
            "epsilon": metrics.RUN_EPSILON,
        }
        for name, gauge in named.items():
            if isinstance(value := said.get(name), int | float):
                yield gauge, (run,), value


def _database(engine: sa.Engine) -> Iterator[Found]:
    """Counts of rows; each query is one pass over an index or a short table.

    Raises:
        FedgeError: the database refuses it.
    """
    devices, runs, variants = schema.devices, schema.runs, schema.draft_variants
    with reading(engine) as connection:
        one_each = sa.func.count()
        query = sa.select(devices.c.tier, devices.c.status, one_each)
        for tier, status, count in connection.execute(query.group_by(devices.c.tier, devices.c.status)):
            yield metrics.DEVICES, (tier, status), count
        expired = (devices.c.status == ACTIVE) & (devices.c.certificate_not_after < time.time())
        query = sa.select(devices.c.tier, sa.func.sum(sa.case((expired, 1), else_=0)))
        for tier, count in connection.execute(query.group_by(devices.c.tier)):
            yield metrics.DEVICES_EXPIRED, (tier,), count
        counts = dict.fromkeys(RUN_STATUSES, 0)
        query = sa.select(runs.c.status, one_each).group_by(runs.c.status)
        counts |= {str(status): int(count) for status, count in connection.execute(query)}
        yield from ((metrics.RUNS, (status,), count) for status, count in counts.items())
        query = sa.select(variants.c.status, one_each).group_by(variants.c.status)
        for status, count in connection.execute(query):
            yield metrics.VARIANTS, (status,), count
        count = connection.scalar(sa.select(sa.func.count(schema.releases.c.version)))
        yield metrics.RELEASES, (), count or 0
        yield from _rollouts(connection)
        yield from _drift(connection)


def _rollouts(connection: sa.Connection) -> Iterator[Found]:
    tiers, rollouts = schema.rollout_tiers, schema.rollouts
    query = sa.select(tiers.c.tier, rollouts.c.state).join(rollouts, tiers.c.rollout == rollouts.c.id)
    for tier, state in connection.execute(query):
        yield metrics.ROLLOUTS, (tier, str(state["status"])), 1


def _drift(connection: sa.Connection) -> Iterator[Found]:
    """Of each tier's newest release that windows came of."""
    watches = schema.drift_watches
    newest = sa.select(watches.c.tier, sa.func.max(watches.c.version).label("version"))
    of = newest.group_by(watches.c.tier).subquery()
    where = (watches.c.tier == of.c.tier) & (watches.c.version == of.c.version)
    for tier, state in connection.execute(sa.select(watches.c.tier, watches.c.state).join(of, where)):
        yield metrics.DRIFT_ALARM, (tier,), state.get("alarm") is not None


def _disk(engine: sa.Engine, home: Home) -> Iterator[Found]:
    """Sizes and dates; what cannot be read now is left out, so that its alarm is that it is absent."""
    try:
        usage = shutil.disk_usage(home.root)
        yield metrics.DISK_FREE, (), usage.free
        yield metrics.DISK_SIZE, (), usage.total
        if (size := _database_bytes(engine, home)) is not None:
            yield metrics.DATABASE_BYTES, (), size
        for name in FOLDERS:
            if (size := folder_bytes(home.root / name)) is not None:
                yield metrics.FOLDER_BYTES, (name,), size
    except OSError:
        pass
    try:
        ends = [found.not_valid_after_utc.timestamp() for found in Authority.open(home.ca).certificates]
        yield metrics.CERTIFICATE_ENDS, ("ca",), min(ends)
        yield metrics.CERTIFICATE_ENDS, ("server",), ServerCertificate.load(home.tls).not_after
        repository = ReleasePlace.of(home.root).repository
        for role in repository.status() if repository.is_there else ():
            yield metrics.METADATA_ENDS, (role.role,), role.expires.timestamp()
    except (FedgeError, OSError):
        pass


def _database_bytes(engine: sa.Engine, home: Home) -> int | None:
    if engine.dialect.name != "postgresql":
        files = (home.database, *(home.database.with_name(f"fedge.db-{end}") for end in ("wal", "shm")))
        return sum(path.stat().st_size for path in files if path.exists())
    try:
        with reading(engine) as connection:
            query = sa.select(sa.func.pg_database_size(sa.func.current_database()))
            return int(connection.scalar(query) or 0)
    except FedgeError:
        return None


def folder_bytes(folder: Path, most: int = MAX_FILES) -> int | None:
    """The length of all files in a folder and below; None where they are too many to count.

    Files that go while it looks are left out; links are not followed.
    """
    total, entries, folders = 0, 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    entries += 1
                    if entries > most:
                        return None
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += _length(entry)
        except FileNotFoundError:
            continue
    return total


def _length(entry: os.DirEntry[Any]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
