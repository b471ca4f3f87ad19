"""`fedge-server init`: a home folder with a certificate authority, a database and settings.

Everything is made in `.init` inside the home and moved out, `server.toml` last: with it the folder is a
home. After a kill the same command begins again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
from pathlib import Path
from typing import Any, Final

from fedge import cli
from fedge.errors import FedgeError, UserError
from fedge.files import sync_folder, write_atomically
from fedge_server.cli.place import add_home, show, tier_name
from fedge_server.hub.home import Home

LINK_PORT, ENROLMENT_PORT = 9443, 9444
EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - both ports are made for the network
_BUILD: Final = ".init"
_PARTS: Final = (
    "ca",
    "tls",
    "keys",
    "repository",
    "fedge.db",
    "server.toml",
)  # in the order in which they are moved
_IGNORED: Final = {"lost+found"}  # of a disk that is mounted there

_SETTINGS = """\
# Settings of a fedge server; `fedge-server preflight` checks them. A change counts from the next start.

[listen]                        # where the hub listens for devices
host = {host}
link_port = {link_port}                # mutual TLS: devices that are enrolled
enrolment_port = {enrolment_port}           # TLS: devices that enrol or renew their certificate

[public]
names = {names}   # in the server's certificate; the first goes into join strings

[database]
url = {url}                        # empty: SQLite in this folder; or postgresql+psycopg://USER@HOST/NAME

[limits]
offline_grace_s = 60            # a device away longer with open work: the work fails, the round goes on
default_deadline_s = 3600       # of a round whose configuration names none
max_connection_age_s = 3600     # then a device connects anew, and shows its certificate again

[certificates]
device_hours = 168              # of a device's certificate; it renews when a third is left
server_days = 90

[delivery]
signers = []                    # unix sockets of signer processes, which hold the keys of tiers
keep = 4                        # releases that a tier offers at a time

[rollouts]
automatic = false               # whether a signed release begins its rollouts by itself
plan = ""                       # of these: a TOML file (docs/rollout.md); empty: 5, 25, 100 percent

[inference]
enabled = true                  # devices that are not sure may ask the global model (docs/inference.md)

[metrics]
listen = ""                     # where Prometheus may ask, such as "127.0.0.1:9445" (docs/monitoring.md)

[telemetry]
keep_days = 90                  # counts that devices send of their answers (docs/telemetry.md)
false_alarms = 0.01             # chance of a drift alarm in so many periods in which nothing changes
periods = 100

[keeping]
releases = 16                   # of each tier: the newest, whose bytes are kept (docs/releases.md)
runs = 100                      # that are over: the newest, whose model is kept
unseen_days = 90                # what a device runs is kept for so long after it was seen last

[workers]
restarts = 3                    # of a run's process that dies without finishing its run
"""


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "init",
        _init,
        summary="make a server's home: certificate authority, database, settings",
        examples="  fedge-server init --home /var/lib/fedge --name fedge.example.org\n"
        "  fedge-server init --home here --name 192.0.2.7 --name localhost --link-port 0\n"
        "  fedge-server init --home small --tier micro --tier board      (their keys stay on this server)",
    )
    made.add_argument(
        "--name",
        action="append",
        metavar="HOST",
        help="a name or address that devices reach this server by; the first goes into join strings "
        "(default: this machine's host name)",
    )
    made.add_argument(
        "--listen",
        default=EVERYWHERE,
        metavar="ADDRESS",
        help="where to listen for devices (default: on every address of this machine)",
    )
    made.add_argument(
        "--link-port", type=int, default=LINK_PORT, metavar="PORT", help="for enrolled devices; 0: any"
    )
    made.add_argument(
        "--enrolment-port", type=int, default=ENROLMENT_PORT, metavar="PORT", help="for new devices; 0: any"
    )
    made.add_argument("--database", metavar="URL", help="instead of SQLite in the home")
    made.add_argument(
        "--tier",
        type=tier_name,
        action="append",
        default=[],
        metavar="TIER",
        help="make its key here; without it a signer process holds the key (docs/signer.md)",
    )
    made.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help="encrypts the keys of root and targets, which you carry away",
    )
    add_home(made)


def _init(arguments: argparse.Namespace) -> int:
    home = Home.chosen(arguments.home)
    url = arguments.database or ""
    names = list(dict.fromkeys(arguments.name or [socket.gethostname()]))
    text = _settings(names, arguments.listen, arguments.link_port, arguments.enrolment_port, url)
    try:
        _prepare(home.root)
        pin = _build(home.root / _BUILD, names, text, url, arguments)
        _move(home.root)
    except OSError as error:
        raise FedgeError(f"{home.root}: a home cannot be made there ({error.strerror})") from error
    value = {"home": str(home.root), "names": names, "pin": pin}
    lines = [
        f"made {home.root}: certificate authority, database, server.toml (names: {', '.join(names)})",
        "next:",
        f"  fedge-server up --home {home.root}",
        f"  fedge-server token create --tier TIER --home {home.root}    (a join string for one device)",
        "  fedge-client enroll JOIN    (on the device)",
        f"Keep a backup of {home.ca}: without it every device has to enrol again.",
        f"Carry away {home.root / 'keys' / 'root.key'} and targets.key: whoever has them can replace all",
        "other keys. They are needed again to add tiers and to change keys; snapshot and timestamp stay.",
    ]
    return show(arguments, value, lines)


def _settings(names: list[str], host: str, link_port: int, enrolment_port: int, url: str) -> str:
    """The text of server.toml, read back once before anything is made.

    Raises:
        UserError: a name, a port or the URL cannot be used.
    """
    import tomllib

    from fedge_server.hub.settings import Settings
    from fedge_server.identity.requests import check_names

    check_names(names)
    if not url.isprintable():
        raise UserError(f"database URL {url!r}: holds a character that cannot be printed")
    text = _SETTINGS.format(
        host=json.dumps(host),
        link_port=link_port,
        enrolment_port=enrolment_port,
        names=json.dumps(names),
        url=json.dumps(url, ensure_ascii=False),
    )
    Settings.from_mapping(tomllib.loads(text))
    return text


def _prepare(root: Path) -> None:
    """An empty `.init` in a home that is new, empty, or left by an init that was interrupted."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = {path.name for path in root.iterdir()} - _IGNORED
    if (root / "server.toml").exists():
        raise UserError(f"{root}: a server's home already; nothing was changed. Use it, or another --home")
    if found and _BUILD not in found:
        raise UserError(f"{root}: not empty, and no server's home; give a new or empty folder")
    if extra := found - {_BUILD, *_PARTS}:
        raise UserError(f"{root}: holds {min(extra)!r} beside an interrupted init; give another folder")
    for name in found:  # never finished, so nobody has used it
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / _BUILD).mkdir(mode=0o700)


def _build(folder: Path, names: list[str], settings: str, url: str, arguments: argparse.Namespace) -> str:
    """Make all parts in a folder; returns the CA's pin."""
    from fedge_server.hub.settings import Certificates
    from fedge_server.identity.authority import Authority
    from fedge_server.registry.database import Registry
    from fedge_server.release import ReleasePlace
    from fedge_server.repository import passphrase_in

    authority = Authority.create(folder / "ca")
    authority.ensure_server_certificate(folder / "tls", names, Certificates().server_days)
    given = arguments.passphrase_file
    place = ReleasePlace(folder, is_server=True)
    place.make(arguments.tier, passphrase=None if given is None else passphrase_in(given))
    Registry.open(folder, url or None).close()
    # It may hold the database's password.
    write_atomically(folder / "server.toml", settings.encode(), mode=0o600)
    return authority.pin


def _move(root: Path) -> None:
    for name in _PARTS:
        if (made := root / _BUILD / name).exists():  # with a URL there is no fedge.db
            if name == _PARTS[-1]:
                sync_folder(root)
            made.replace(root / name)
    sync_folder(root)
    shutil.rmtree(root / _BUILD)
