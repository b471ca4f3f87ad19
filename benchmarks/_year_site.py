"""A server for `year.py` without its sockets: home, authority, repository, signers, registry, and the loop.

Everything is the server's own: the loop that learns again (`hub.learning.Learner`), rollouts, the telemetry
store with its watches, the publisher, the shelf that devices fetch from, a signer's process for each tier.
Two things are not as in a deployment: the clock of all these is the benchmark's, and the worker of a run asks
simulated clients (`fedge_simulations`) instead of agents. Signatures and certificates are of today.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import _faults  # noqa: F401 - makes the fleet importable
import numpy as np
from federation import Process, toml
from fleet import signer_of
from flwr.app import Context, RecordDict

from fedge.config import Config
from fedge.errors import AbsentError
from fedge_client.updater.streams import Fetcher, folder
from fedge_server import app as server_app
from fedge_server import pipeline
from fedge_server.cli import main
from fedge_server.continual.learnings import Learnings
from fedge_server.continual.state import Asked
from fedge_server.continual.terms import Terms
from fedge_server.delivery import Shelf
from fedge_server.delivery.sealing import Sealing
from fedge_server.hub.home import Home
from fedge_server.hub.learning import Learner
from fedge_server.hub.settings import Settings
from fedge_server.inference.released import reader
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace
from fedge_server.release.returning import take_back
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.rollout.audit import Audit
from fedge_server.rollout.service import Rollouts
from fedge_server.rounds.loop import Learned
from fedge_server.telemetry.references import references
from fedge_server.telemetry.store import Telemetry
from fedge_simulations.grid import RUN_ID, SERVER_NODE
from fedge_simulations.simulate import fleet_of
from fedge_simulations.world import prepare

DAY_S = 86_400
BEGINS = 20_454 * DAY_S  # 2026-01-01, Unix seconds


@dataclass(slots=True)
class Site:
    """The server. Leaving the context ends its signers.

    Args:
        root: empty, with a short path: there are unix sockets in it.
        tiers: each with a signer.
        say: takes a line of what happens.
    """

    root: Path
    tiers: Sequence[str]
    now: float = float(BEGINS)
    registry: Registry = field(init=False)
    home: Home = field(init=False)
    shelf: Shelf = field(init=False)
    telemetry: Telemetry = field(init=False)
    learner: Learner = field(init=False)
    _signers: list[Process] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        self.home = Home(self.root / "server")
        with contextlib.redirect_stdout(io.StringIO()):
            if main(["init", "--name", "127.0.0.1", "--home", str(self.home.root)]):
                raise AssertionError("fedge-server init failed")
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        sockets = []
        for tier in self.tiers:
            own, socket = self.root / f"signer-{tier}", self.root / f"{tier}.sock"
            own.mkdir()
            self._signers.append(signer_of(tier, own, socket))
            sockets.append(str(socket))
        telemetry = {"watch_period_s": DAY_S}  # false alarms are counted in days
        self.home.settings.write_text(toml({"delivery": {"signers": sockets}, "telemetry": telemetry}))
        self.registry = self._stack.enter_context(Registry.open(self.home.root))
        self.shelf = Shelf(self.home.root / "repository")
        known = references(self.registry, reader(self.registry))
        storing = Settings.load(self.home.settings).telemetry.storing()
        self.telemetry = Telemetry(self.registry.engine, storing, known, self.clock)
        self.learner = Learner(self.home, self.registry, self.clock)

    def _end(self) -> None:
        for signer in self._signers:
            with contextlib.suppress(AssertionError):
                signer.end()
        self._stack.close()

    def clock(self) -> float:
        """Unix seconds of the simulated year."""
        return self.now

    @property
    def day(self) -> int:
        """Of the year, from 0."""
        return int(self.now - BEGINS) // DAY_S

    @property
    def learnings(self) -> Learnings:
        """All of them."""
        return Learnings(self.registry.engine, self.clock)

    @property
    def rollouts(self) -> Rollouts:
        """All of them."""
        return Rollouts(self.registry, self.clock)

    def data(self, name: str) -> Path:
        """The file that runs of a learning read."""
        return self.home.root / "data" / f"{name}.npz"

    def begin(self, name: str, config: Mapping[str, Any], terms: Mapping[str, Any]) -> None:
        """Learn it from now on, as `learn start` and, for the first release, `learn now` do."""
        checked = Config.from_mapping({**config, "data": str(self.data(name))})
        self.learnings.start(
            name, checked.task, checked.to_mapping(), Terms.from_mapping(terms), who="operator"
        )
        self.learnings.happened(name, Asked("operator", "the first release"))

    def take_back(self) -> None:
        """What the hub does about halted rollouts: the old content is signed anew."""

        def mark(tier: str) -> tuple[int, int]:
            view = self.shelf.refresh()
            return (view.floor(tier), view.newest(tier)) if tier in view.tiers else (0, 0)

        take_back(ReleasePlace.of(self.home.root), self.registry, mark, self.clock)

    def queued(self) -> list[str]:
        """Runs that wait for a worker."""
        return [run["id"] for run in self.registry.runs() if run["status"] == "queued"]

    def work(self, run_id: str) -> None:
        """What a run's own process does (`fedge_server.link.worker`), with simulated clients."""
        row = self.registry.run(run_id)
        if row is None or not self.registry.begin_queued(run_id):
            raise AssertionError(f"run {run_id}: is not queued")
        config = Config.from_mapping(row["config"])
        world, own = prepare(config), self.home.run(run_id)
        place = pipeline.Place(
            run_id,
            own,
            self.home.root,
            self.registry,
            config,
            world.task,
            world.server,
            lambda line: self._log(run_id, line),
            fleet=fleet_of(world, own),
            page=False,
        )

        def finish(learned: Learned) -> None:
            outcomes, _ = pipeline.release(place, learned)
            pipeline.conclude(place, learned, outcomes, clients=len(world.clients))

        built = server_app.build(lambda *_: world.server, pipeline.observer(place), finish)
        # What clients keep lies with the run: two tasks have nothing to do with each other.
        with closing(world.grid(server_app.run_config(config, own, run_id))) as grid:
            settings = server_app.run_config(config, self.home.root, run_id)
            built(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))

    def _log(self, run_id: str, line: str) -> None:
        with self.home.run_log(run_id).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def fetcher(self, device_id: str, tier: str) -> Fetcher:
        """What the Distribution service gives to a device, without the connection."""
        self.shelf.refresh()
        files = folder(self.home.root / "repository")
        sealing = Sealing(self.shelf, ContentKeys(self.home.keys / "content"))

        def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
            kind, _, rest = name.partition("/")
            if kind == "deltas":
                raise AbsentError(f"{name}: there is none; fetch the whole")
            if kind != "keys":
                yield from files(name, maximum, offset)
                return
            found = sealing.key_for(self.registry.devices, device_id, tier, int(rest.split("/")[1]))
            if found is None:
                raise AbsentError(f"{name}: the version is not sealed")
            yield found[offset:]

        return fetch

    def story(self) -> list[dict[str, Any]]:
        """The audit trail of learnings and rollouts, as plain values."""
        entries = Audit(self.registry.engine).entries(last=10_000)
        return [
            {"at": each.at_ms / 1000, "subject": each.subject, "what": each.what, "why": each.why}
            for each in entries
        ]


def write_data(path: Path, parts: Sequence[tuple[Any, Any]], held: tuple[Any, Any]) -> None:
    """The file of a run: what clients hold now, and what the server does."""
    path.parent.mkdir(exist_ok=True)
    client = np.concatenate([np.full(len(y), number) for number, (_, y) in enumerate(parts)])
    x, y = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    np.savez(path, x_train=x, y_train=y, client_train=client, x_test=held[0], y_test=held[1])
