"""`fedge-server signer`: a process of its own user that holds a tier's key; and what such processes say."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

from fedge import cli, logs
from fedge.errors import SignerAwayError, UserError
from fedge_server.cli.place import add_home, show, table, tier_name


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "sign releases of a tier in a process of its own: serve, show"
    group = commands.add_parser("signer", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    serve = cli.subcommand(
        inner,
        "serve",
        _serve,
        summary="hold a tier's key, and sign what passes the rules and the limits of this signer",
        examples="  fedge-server signer serve --key tier-micro.key --socket /run/fedge-signer/micro.sock \\\n"
        "    --memory /var/lib/fedge-signer --limits /etc/fedge/signer.toml --allow-uid 990",
    )
    serve.add_argument("--key", type=Path, required=True, metavar="FILE", help="the private key, mode 0600")
    serve.add_argument(
        "--tier", type=tier_name, metavar="TIER", help="that it signs for (default: as FILE is called)"
    )
    serve.add_argument("--socket", type=Path, required=True, metavar="PATH", help="unix socket to listen on")
    serve.add_argument(
        "--memory", type=Path, required=True, metavar="DIR", help="what it has signed; nobody else's folder"
    )
    serve.add_argument("--limits", type=Path, metavar="FILE", help="limits of its own, TOML (docs/signer.md)")
    serve.add_argument(
        "--allow-uid",
        type=int,
        action="append",
        metavar="N",
        help="a user that may ask; give it once for each (default: the signer's own)",
    )
    logs.add_option(serve)
    serve.add_argument("--passphrase-file", type=Path, metavar="FILE", help="of the key, mode 0600")
    example = "  fedge-server signer show --home /var/lib/fedge-server --format json"
    shown = cli.subcommand(
        inner, "show", _show, summary="ask signers what they sign for, and since when", examples=example
    )
    shown.add_argument(
        "--socket", type=Path, action="append", metavar="PATH", help="(default: those in [delivery] signers)"
    )
    add_home(shown)


def _serve(arguments: argparse.Namespace) -> int:
    from fedge.delivery import role_of
    from fedge.files import sole_holder
    from fedge_server.hub.systemd import tell_systemd
    from fedge_server.repository import load_key, passphrase_in
    from fedge_server.signer.judging import Judge
    from fedge_server.signer.limits import Limits
    from fedge_server.signer.memory import Memory
    from fedge_server.signer.service import serving

    logs.start(arguments.log_format, text=logging.Formatter(logs.SERVER))
    tier = arguments.tier or arguments.key.stem.removeprefix("tier-")
    given = arguments.passphrase_file
    key = load_key(arguments.key, passphrase=None if given is None else passphrase_in(given))
    limits = Limits() if arguments.limits is None else Limits.load(_own(arguments.limits))
    memory = Memory(arguments.memory, role_of(tier))
    allowed = arguments.allow_uid or [os.geteuid()]
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        arguments.memory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with sole_holder(_own(arguments.memory) / f"{role_of(tier)}.lock"):
            memory.last()  # a memory that cannot be read is no reason to begin without one
            with serving(Judge(tier, key, memory, limits), arguments.socket, allowed):
                logging.getLogger("fedge.signer").info(
                    "signing for tier %s with key %s, asked by users %s", tier, key.key.keyid[:8], allowed
                )
                tell_systemd("READY=1")
                ended.wait()
                tell_systemd("STOPPING=1")
    except BlockingIOError as error:
        raise UserError(f"{arguments.memory}: another signer of tier {tier!r} uses it") from error
    except OSError as error:
        raise UserError(f"{arguments.memory}: cannot be used ({error.strerror})") from error
    return 0


def _own(path: Path) -> Path:
    """What a signer goes by, if nobody else can write it: it must hold against whoever asks for signatures.

    Raises:
        UserError: somebody else can.
    """
    if path.exists():
        found = path.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise UserError(f"{path}: belongs to user {found.st_uid}; it must be the signer's, or root's")
        if found.st_mode & 0o022:
            raise UserError(
                f"{path}: others may write it (mode {found.st_mode & 0o777:o}), and so say what is signed; "
                f"run: chmod go-w {path}"
            )
    return path


def _show(arguments: argparse.Namespace) -> int:
    from fedge_server.hub.home import Home
    from fedge_server.release import ReleasePlace
    from fedge_server.signer.remote import RemoteSigning

    sockets = arguments.socket
    if sockets is None:
        sockets = [Path(p) for p in ReleasePlace.of(Home.chosen(arguments.home).root).delivery.signers]
    value: list[dict[str, Any]] = []
    for path in sockets:
        try:
            found = RemoteSigning(path)
            value.append(
                {"socket": str(path), "tier": found.tier, "key": found.key.keyid, "version": found.version}
            )
        except SignerAwayError as error:
            value.append({"socket": str(path), "error": str(error)})
    rows = [["socket", "tier", "key", "signed last"]]
    for each in value:
        if "error" in each:
            rows.append([each["socket"], "-", "-", each["error"]])
        else:
            last = f"version {each['version']}" if each["version"] else "nothing yet"
            rows.append([each["socket"], each["tier"], each["key"][:8], last])
    show(arguments, value, table(rows) if value else ["no signers in [delivery] signers"])
    return 1 if any("error" in each for each in value) else 0
