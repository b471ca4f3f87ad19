"""`fedge-server run`: start, watch, stop and look at runs."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import show

if TYPE_CHECKING:
    from fedge.config import Config
    from fedge_server.hub.home import Home
    from fedge_server.registry.database import Registry

POLL_S: Final = 0.3  # between looks at a run that is waited for
OVER: Final = ("done", "failed", "stopped")
_NO_HUB: Final = "no hub is up: it counts from the hub's next start"


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "what is and was learned: start, ls, show, log, stop, resume"
    group = commands.add_parser("run", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    _add_start(inner)
    home = "  fedge-server run {} --home out/digits"
    _common(cli.subcommand(inner, "ls", _ls, summary="list runs", examples=home.format("ls")))
    for name, run, summary, options in (
        ("show", _show, "show one run and its rounds", " --format json"),
        ("stop", _stop, "stop a run after what it has committed", ""),
        ("resume", _resume, "let a failed or stopped run go on from its last committed round", ""),
    ):
        made = cli.subcommand(inner, name, run, summary=summary, examples=home.format(f"{name} ID") + options)
        made.add_argument("which", metavar="ID")
        _common(made)
    log = cli.subcommand(
        inner, "log", _log, summary="print what a run's worker has said", examples=home.format("log ID")
    )
    log.add_argument("which", metavar="ID")
    log.add_argument("--follow", action="store_true", help="go on until the run is over")
    log.add_argument("--home", type=Path, metavar="DIR", help="home or run folder (default: FEDGE_HOME)")


def _add_start(inner: Any) -> None:
    start = cli.subcommand(
        inner,
        "start",
        _start,
        summary="check a configuration and queue a run of it",
        examples="  fedge-server run start digits.toml --set rounds.count=10\n"
        "  fedge-server run start digits.toml --name first --wait",
    )
    start.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to learn")
    start.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    start.add_argument("--name", metavar="ID", help="name of the run (default: one is made)")
    start.add_argument("--wait", action="store_true", help="print its log and end when it is over")
    _common(start)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, metavar="DIR", help="home or run folder (default: FEDGE_HOME)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def open_registry(given: Path | None) -> tuple[Home, Registry]:
    """The registry of a server's home, or of the folder of a simulation.

    Raises:
        UserError: there is none.
    """
    from fedge_server.hub.home import Home
    from fedge_server.hub.settings import Settings
    from fedge_server.registry.database import Registry

    chosen = given or os.environ.get("FEDGE_HOME")
    if not chosen:
        raise UserError("which home folder? give --home DIR or set FEDGE_HOME")
    home = Home(Path(chosen))
    url = Settings.load(home.settings).database_url if home.settings.exists() else None
    if url is None and not home.database.exists():
        raise UserError(f"{home.root} is no home of fedge: it holds no fedge.db")
    return home, Registry.open(home.root, url)


def find_run(registry: Registry, run_id: str | None) -> dict[str, Any]:
    """The run of this name; None: the newest.

    Raises:
        UserError: there is none.
    """
    runs = registry.runs()
    found = [run for run in runs if run_id in (None, run["id"])]
    if not found:
        raise UserError(
            f"run {run_id!r}: there is none; runs: {', '.join(run['id'] for run in runs) or 'none'}"
        )
    return found[-1]


def _ls(arguments: argparse.Namespace) -> int:
    _, registry = open_registry(arguments.home)
    with registry:
        rows = [_row(registry, run) for run in registry.runs()]
    lines = [f"{r['id']}  {r['status']:8} {r['task']}  {r['rounds']} rounds  {r['created']}" for r in rows]
    return show(arguments, rows, lines or ["no runs"])


def _row(registry: Registry, run: Mapping[str, Any]) -> dict[str, Any]:
    rounds = max(len(registry.records(run["id"])) - 1, 0)
    return {key: run[key] for key in ("id", "task", "seed", "status", "reason", "created")} | {
        "rounds": rounds
    }


def _show(arguments: argparse.Namespace) -> int:
    _, registry = open_registry(arguments.home)
    with registry:
        run = find_run(registry, arguments.which)
        records = registry.records(run["id"])[1:]
        history = [record.to_json() for record in records]
        row = _row(registry, run) | {"config": run["config"], "history": history}
    lines = [f"{key}: {row[key]}" for key in ("id", "task", "seed", "status", "reason", "created")]
    lines += [
        f"round {r['round']}: accuracy {r['accuracy']:.4f}, loss {r['loss']:.4f}, {r['clients']} clients, "
        f"{r['failures']} without an update" + (f", {record.standing_out}" if record.conspicuous else "")
        for r, record in zip(history, records, strict=True)
    ]
    return show(arguments, row, lines)


def _start(arguments: argparse.Namespace) -> int:
    from fedge.config import Config
    from fedge_server.hub.home import RUN_ID, Home
    from fedge_server.hub.settings import Settings

    home = Home.chosen(arguments.home)
    Settings.load(home.settings)  # says so when this is no server's home
    run_id = arguments.name or f"run-{secrets.token_hex(6)}"
    if not RUN_ID.fullmatch(run_id):
        raise UserError(f"--name {run_id[:80]!r}: letters, digits, '.', '_' and '-', at most 64")
    config = Config.load(arguments.config, arguments.set)
    _, registry = open_registry(home.root)
    with registry:
        check(config, registry)
        registry.queue_run(run_id, task=config.task, seed=config.seed, config=config.to_mapping())
        _write_config(home, run_id, config)
        up = _tell_hub(home)
        if arguments.wait and up:
            if arguments.format == "text":
                _say(run_id)
            return _wait(arguments, home, registry, run_id)
    lines = [run_id] if up else [run_id, _NO_HUB]
    return show(arguments, {"id": run_id, "status": "queued", "hub": up}, lines)


def check(config: Config, registry: Registry) -> None:
    """Find out now, and not in the log of a worker, what cannot work.

    Raises:
        UserError: the task, its digest, the data, a tier or the earlier model cannot be used.
    """
    from fedge.task import resolve
    from fedge.task_digest import task_digest
    from fedge_server.compression import check_possible
    from fedge_server.compression.sources import check_source
    from fedge_server.data import own_data
    from fedge_server.rounds.starting import check_start

    task = resolve(config.task)
    task_digest(config.task)
    data = own_data(config, task)
    if config.tiers:
        check_source(config, data.proxy)
        check_possible(task, data.spec, config, data.proxy.x, gate=data.gate)
    if config.model.start is not None or config.model.distil_from is not None:
        check_start(config, task, data, registry)


def _write_config(home: Home, run_id: str, config: Config) -> None:
    from fedge.files import write_atomically

    text = json.dumps(config.to_mapping(), indent=2)
    write_atomically(home.run(run_id) / "config.json", text.encode() + b"\n")


def _tell_hub(home: Home) -> bool:
    from fedge_server.hub.control import refresh

    return refresh(home)


def _wait(arguments: argparse.Namespace, home: Home, registry: Registry, run_id: str) -> int:
    """Print the log until the run is over; 0 when it is done."""
    run = _follow(home, registry, run_id, quiet=arguments.format == "json")
    line = f"run {run_id}: {run['status']}" + (f" ({run['reason']})" if run["reason"] else "")
    show(arguments, _row(registry, run), [line])
    return 0 if run["status"] == "done" else 1


def _follow(home: Home, registry: Registry, run_id: str, *, quiet: bool = False) -> dict[str, Any]:
    """Print a run's log as it grows; returns the run once it is over."""
    position = 0
    while True:
        run = find_run(registry, run_id)
        position = _print_from(home.run_log(run_id), position, quiet=quiet)
        if run["status"] in OVER:
            return run
        time.sleep(POLL_S)


def _print_from(path: Path, position: int, *, quiet: bool = False) -> int:
    """Print a file from a position on; returns the next one."""
    try:
        with path.open("rb") as file:
            file.seek(position)
            while data := file.read(64 * 1024):
                position += len(data)
                if not quiet:
                    sys.stdout.write(data.decode("utf-8", "replace"))
    except FileNotFoundError:
        return position
    sys.stdout.flush()
    return position


def _log(arguments: argparse.Namespace) -> int:
    home, registry = open_registry(arguments.home)
    with registry:
        find_run(registry, arguments.which)
        if arguments.follow:
            _follow(home, registry, arguments.which)
        else:
            _print_from(home.run_log(arguments.which), 0)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    home, registry = open_registry(arguments.home)
    with registry:
        status = registry.request_stop(arguments.which)
        up = _tell_hub(home)
    lines = [f"run {arguments.which}: {status}"] + ([] if up or status == "stopped" else [_NO_HUB])
    return show(arguments, {"id": arguments.which, "status": status, "hub": up}, lines)


def _resume(arguments: argparse.Namespace) -> int:
    home, registry = open_registry(arguments.home)
    with registry:
        find_run(registry, arguments.which)
        registry.queue_again(arguments.which)
        up = _tell_hub(home)
    lines = [f"run {arguments.which}: queued"] + ([] if up else [_NO_HUB])
    return show(arguments, {"id": arguments.which, "status": "queued", "hub": up}, lines)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
