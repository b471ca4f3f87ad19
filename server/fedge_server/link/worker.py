"""The process of one run: it runs the Flower ServerApp over a hub's devices, then compresses and publishes.

Started and restarted by the hub's supervisor. Killed at any moment and started again, it goes on from the
last committed round: its new session closes whatever the old one had open.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge import logs
from fedge.errors import ConfigError, FedgeError, HubAwayError, SupersededError
from fedge.files import sole_holder
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Settings
from fedge_server.registry.database import Registry

if TYPE_CHECKING:
    from fedge.config import Config
    from fedge_server.link.grid import LinkGrid
    from fedge_server.rounds.record import RoundRecord

FAILED: Final = 1  # exit code of what is no user's mistake and not caught further down
ASKED: Final = "asked to stop"
TIDYING_S: Final = 10.0  # after it was asked to stop; then the process ends as if it had been killed


_log = logging.getLogger("fedge.run")


class Stopped(BaseException):
    """The supervisor has asked this process to end; no error handler may swallow it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one run to its end and return the exit code: 0 also when asked to stop."""
    parser = argparse.ArgumentParser(prog="python -m fedge_server.link.worker", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder of the server")
    parser.add_argument("--run", required=True, help="name of the run")
    logs.add_option(parser)
    arguments = parser.parse_args(argv)
    # Others' libraries tell each step of an export as INFO; the run's log is for whoever watches the run.
    plain, about = logging.Formatter("%(message)s"), {"run": arguments.run}
    logs.start(arguments.log_format, text=plain, level=logging.WARNING, stream=sys.stdout, **about)
    logging.getLogger("fedge").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _guarded(Home(arguments.home.absolute()), arguments.run)
    except Stopped:
        _say(ASKED)
        return 0


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows only tidies up
    # Python drops what is raised while an object is finalised, and a library may hang on an exception in it.
    end = threading.Timer(TIDYING_S, _leave)
    end.daemon = True
    end.start()
    raise Stopped


def _leave() -> None:
    _say(ASKED)
    os._exit(0)


def _guarded(home: Home, run_id: str) -> int:
    """Run the run; whatever goes wrong is its reason, as the last line of the log and in the database."""
    try:
        settings = Settings.load(home.settings)
        with _locked(home.worker_lock(run_id)), Registry.open(home.root, settings.database_url) as registry:
            try:
                _work(home, settings.database_url, registry, run_id)
            except (SupersededError, HubAwayError, Stopped):
                raise  # the run is as it was: the hub, or the next one, starts another worker
            except FedgeError as error:
                registry.end_run(run_id, "failed", str(error))
                raise
            except Exception as error:
                _log.exception("run %s: an internal fault", run_id)
                registry.end_run(run_id, "failed", f"{type(error).__name__}: {error}")
                raise FedgeError(f"run {run_id}: {type(error).__name__}: {error}") from error
    except SupersededError as error:
        _say(f"stopped: {error}")
        return 0
    except FedgeError as error:
        _say(f"failed: {error}")
        return error.exit_code
    return 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the run: two workers of one run would close each other's messages.

    Raises:
        FedgeError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(sole_holder(path))
        except BlockingIOError as error:
            raise FedgeError(f"{path}: another worker has this run") from error
        yield


def _work(home: Home, database: str | None, registry: Registry, run_id: str) -> None:
    """From waiting for devices to the summary."""
    from fedge.config import Config
    from fedge.task import resolve
    from fedge_server.compression.clients import Fleet
    from fedge_server.data import own_data
    from fedge_server.pipeline import Place, observer

    row = registry.run(run_id)
    if row is None:
        raise ConfigError(f"run {run_id!r}: there is none in {home.root}")
    config = Config.from_mapping(row["config"])
    task = resolve(config.task)
    server = own_data(config, task)
    place = Place(run_id, home.run(run_id), home.root, registry, config, task, server, _say)
    grid = _grid(home, run_id, config)
    place = replace(place, fleet=Fleet(lambda _: nullcontext(grid), home.run(run_id) / "students"))
    try:
        nodes = grid.wait_for(config.clients.needed)
        _say(
            f"task {config.task}: {len(nodes)} devices online; server: {len(server.proxy)} proxy, "
            f"{len(server.test)} test, {len(server.gate)} gate"
        )
        watch = observer(place, lambda record: _tell(config, record))
        _learn_and_release(grid, place, database, watch)
    finally:
        grid.close()


def _grid(home: Home, run_id: str, config: Config) -> LinkGrid:
    from fedge.task_digest import task_digest
    from fedge.wire.v1.admin_pb2 import Selection
    from fedge_server.link.grid import LinkGrid

    clients = config.clients
    wanted = Selection(
        task=config.task,
        task_digest=task_digest(config.task),
        tiers=clients.tiers,
        tags=clients.tags,
        max_seconds=clients.max_seconds or 0.0,
    )
    return LinkGrid(home, run_id, wanted)


def _learn_and_release(grid: LinkGrid, place: Any, database: str | None, watch: Any) -> None:
    from flwr.app import Context, RecordDict

    from fedge_server import app, pipeline
    from fedge_server.link.grid import RUN_ID, SERVER_NODE
    from fedge_server.rounds.loop import Learned

    def finish(learned: Learned) -> None:
        outcomes, _ = pipeline.release(place, learned)
        asked = max(record.asked for record in learned.records)
        pipeline.conclude(place, learned, outcomes, clients=asked)

    settings = app.run_config(place.config, place.home, place.run_id, database)
    server_app = app.build(lambda *_: place.server, watch, finish)
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))


def _tell(config: Config, record: RoundRecord) -> None:
    """A round in one line; as JSON with its numbers."""
    from fedge_server.pipeline import round_line

    numbers = {name: value for name, value in record.metrics.items() if isinstance(value, float)}
    about = {"round": record.round, "clients": record.clients, "seconds": record.seconds}
    refused = {"asked": record.asked, "rejected": len(record.rejected), "train_loss": record.train_loss}
    _log.info(round_line(config, record), extra={**numbers, **about, **refused})


def _say(line: str, **fields: object) -> None:
    _log.info("%s", line, extra=fields)  # the supervisor keeps it as the run's log


if __name__ == "__main__":
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    sys.exit(main())
