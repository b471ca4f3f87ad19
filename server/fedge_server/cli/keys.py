"""`fedge-server keys`: the keys and roles of a repository of releases.

No passphrase is ever an argument, which every user of the machine could read: it comes from a file, or is
asked for on a terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import FormatError, UserError
from fedge.files import write_atomically
from fedge_server.cli.place import add_home, show, table, tier_name
from fedge_server.hub.home import Home

if TYPE_CHECKING:
    from fedge_server.release import ReleasePlace
    from fedge_server.repository import Repository, RoleKeys, Signing
    from fedge_server.repository.keys import Passphrase

_SIGN = "a private key, KEY=FILE with the file of its passphrase, or a signer's socket; once for each key"
_PUBLIC = "a public key of the role from now on, or a signer's socket; once for each key"


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = (
        "keys and roles of the repository: new, init, make, show, add-tier, rotate, suspend, renew, refresh"
    )
    made = commands.add_parser("keys", help=about, description=about)
    group = made.add_subparsers(required=True, metavar="COMMAND")
    _add_new(group)
    _add_init(group)
    _add_make(group)
    example = "  fedge-server keys show --home /var/lib/fedge --format json"
    add_home(cli.subcommand(group, "show", _show, summary="every role, its keys and dates", examples=example))
    _add_changes(group)


def _add_new(group: Any) -> None:
    made = cli.subcommand(
        group,
        "new",
        _new,
        summary="make a key: FILE for whoever signs with it, FILE.pub for the repository",
        examples="  fedge-server keys new root-ann\n"
        "  fedge-server keys new targets --passphrase-file /media/stick/passphrase\n"
        "  fedge-server keys new timestamp --online",
    )
    made.add_argument("file", metavar="FILE", type=Path, help="the private key; it is never overwritten")
    made.add_argument("--kind", choices=("ed25519", "p256"), default="ed25519", help="of the key")
    made.add_argument("--online", action="store_true", help="not encrypted, so that the server can use it")
    made.add_argument("--passphrase-file", type=Path, metavar="FILE", help="mode 0600; else it is asked for")
    made.add_argument("--format", choices=("text", "json"), default="text")


def _add_init(group: Any) -> None:
    made = cli.subcommand(
        group,
        "init",
        _init,
        summary="begin a repository without tiers",
        examples="  fedge-server keys init --root ann.pub --root ben.pub --root eva.pub \\\n"
        "    --targets targets.pub --snapshot snapshot.pub --timestamp timestamp.pub \\\n"
        "    --sign ann --sign ben --sign targets --sign snapshot --sign timestamp",
    )
    made.add_argument(
        "--root", type=Path, action="append", required=True, metavar="FILE", help="a public key of the root"
    )
    made.add_argument("--threshold", type=int, default=2, metavar="N", help="how many of them must sign")
    for role in ("targets", "snapshot", "timestamp"):
        made.add_argument(f"--{role}", type=Path, required=True, metavar="FILE", help=f"public key of {role}")
    _add_signing(made)


def _add_make(group: Any) -> None:
    made = cli.subcommand(
        group,
        "make",
        _make,
        summary="make what a home lacks: keys, the repository, and tiers whose keys lie here",
        examples="  fedge-server keys make\n  fedge-server keys make --tier micro --tier board",
    )
    made.add_argument(
        "--tier", type=tier_name, action="append", default=[], metavar="TIER", help="make its key here too"
    )
    made.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help="of root and targets: encrypts, or opens them"
    )
    add_home(made)


def _add_changes(group: Any) -> None:
    online = "--sign snapshot --sign timestamp"
    example = f"  fedge-server keys add-tier micro --public micro.pub --sign targets --sign micro {online}"
    made = cli.subcommand(group, "add-tier", _add_tier, summary="delegate to a new tier", examples=example)
    made.add_argument("tier", type=tier_name, metavar="TIER", help="its name")
    _add_public(made)
    made.add_argument("--floor", type=int, default=0, metavar="VERSION", help="devices run nothing below it")
    _add_signing(made)
    made = cli.subcommand(
        group,
        "rotate",
        _rotate,
        summary="replace the keys of a role, or its threshold; keys that are not named are revoked",
        examples="  fedge-server keys rotate tier-micro --public new.pub --sign targets --sign new \\\n"
        f"    {online}\n"
        "  fedge-server keys rotate timestamp --public new.pub --sign ann --sign ben --sign snapshot \\\n"
        "    --sign timestamp --sign new",
    )
    made.add_argument("role", metavar="ROLE", help="root, targets, snapshot, timestamp or tier-NAME")
    _add_public(made)
    made.add_argument("--lost", action="store_true", help="the old keys of this role can sign no more")
    _add_signing(made)
    example = f"  fedge-server keys suspend micro --sign targets {online}"
    about = "revoke all keys of a tier: its devices accept nothing until rotate gives it new ones"
    made = cli.subcommand(group, "suspend", _suspend, summary=about, examples=example)
    made.add_argument("tier", type=tier_name, metavar="TIER", help="its name")
    _add_signing(made)
    example = f"  fedge-server keys renew root --sign ann --sign ben {online}"
    about = "sign root, targets or a tier again for another lifetime"
    made = cli.subcommand(group, "renew", _renew, summary=about, examples=example)
    made.add_argument("role", metavar="ROLE", help="root, targets or tier-NAME")
    _add_signing(made)
    example = f"  fedge-server keys refresh {online}"
    about = "sign timestamp and snapshot again where they are due; to be called every few hours"
    made = cli.subcommand(group, "refresh", _refresh, summary=about, examples=example)
    made.add_argument("--force", action="store_true", help="also what is not due yet")
    _add_signing(made)


def _add_public(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--public", type=Path, action="append", required=True, metavar="FILE", help=_PUBLIC)
    parser.add_argument("--threshold", type=int, default=1, metavar="N", help="how many of them must sign")


def _add_signing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sign", action="append", required=True, metavar="KEY", help=_SIGN)
    add_home(parser)


def _new(arguments: argparse.Namespace) -> int:
    from fedge_server.repository import create_key, passphrase_in, public_pem

    path: Path = arguments.file
    passphrase: Passphrase | None = None
    if arguments.online and arguments.passphrase_file:
        raise UserError("--online: such a key has no passphrase; leave out --passphrase-file")
    if arguments.passphrase_file is not None:
        passphrase = passphrase_in(arguments.passphrase_file)
    elif not arguments.online:
        passphrase = _asked(path, twice=True)
    public = path.with_name(f"{path.name}.pub")
    if public.exists():
        raise UserError(f"{public}: exists already; a key is never overwritten")
    made = create_key(path, kind=arguments.kind, passphrase=passphrase)
    write_atomically(public, public_pem(made.key), replace=False)
    value = {"private": str(path), "public": str(public), "key": made.key.keyid}
    return show(
        arguments, value, [f"key {made.key.keyid[:8]}: {path} signs, {public} goes to the repository"]
    )


def _init(arguments: argparse.Namespace) -> int:
    keys = {role: _public([getattr(arguments, role)], 1) for role in ("targets", "snapshot", "timestamp")}
    keys["root"] = _public(arguments.root, arguments.threshold)
    repository = _repository(arguments)
    repository.create(keys, _signing(arguments))  # type: ignore[arg-type]  # the roles are all of TopRole
    return _status(arguments, repository)


def _make(arguments: argparse.Namespace) -> int:
    from fedge_server.release import ReleasePlace
    from fedge_server.repository import passphrase_in

    place = ReleasePlace.of(Home.chosen(arguments.home).root)
    given = arguments.passphrase_file
    _refuse_keyed(place, arguments.tier)
    place.make(arguments.tier, passphrase=None if given is None else passphrase_in(given))
    return _status(arguments, place.repository)


def _refuse_keyed(place: ReleasePlace, tiers: Sequence[str]) -> None:
    """A key that is made here for a tier which has others would sign nothing."""
    known = place.tiers()
    held = place.at_hand().tiers if known.keys() & tiers else {}
    for tier in known.keys() & tiers:
        keys, _ = known[tier]
        if not keys:
            raise UserError(f"tier {tier!r} is suspended; run: fedge-server keys rotate tier-{tier}")
        if not {key.key.keyid for key in held.get(tier, ())} & set(keys):
            raise UserError(f"tier {tier!r} has {place.elsewhere(tier, keys)}")


def _show(arguments: argparse.Namespace) -> int:
    return _status(arguments, _repository(arguments))


def _add_tier(arguments: argparse.Namespace) -> int:
    def change(repository: Repository, signing: Sequence[Signing]) -> None:
        keys = _public(arguments.public, arguments.threshold)
        repository.add_tier(arguments.tier, keys, signing, floor=arguments.floor)

    return _changed(arguments, change)


def _rotate(arguments: argparse.Namespace) -> int:
    def change(repository: Repository, signing: Sequence[Signing]) -> None:
        keys = _public(arguments.public, arguments.threshold)
        repository.rotate(arguments.role, keys, signing, is_lost=arguments.lost)

    return _changed(arguments, change)


def _suspend(arguments: argparse.Namespace) -> int:
    return _changed(arguments, lambda repository, signing: repository.suspend(arguments.tier, signing))


def _renew(arguments: argparse.Namespace) -> int:
    return _changed(arguments, lambda repository, signing: repository.renew(arguments.role, signing))


def _refresh(arguments: argparse.Namespace) -> int:
    def change(repository: Repository, signing: Sequence[Signing]) -> None:
        repository.refresh(signing, force=arguments.force)

    return _changed(arguments, change)


def _changed(arguments: argparse.Namespace, change: Callable[[Repository, Sequence[Signing]], None]) -> int:
    repository = _repository(arguments)
    change(repository, _signing(arguments))
    return _status(arguments, repository)


def _status(arguments: argparse.Namespace, repository: Repository) -> int:
    from fedge_server.release import ReleasePlace

    found, place = repository.status(), ReleasePlace.of(Home.chosen(arguments.home).root)
    value = [
        {
            "role": role.role,
            "version": role.version,
            "expires": role.expires.isoformat(),
            "threshold": role.threshold,
            "keys": list(role.keys),
            "due": role.is_due,
            "ending": place.is_ending(role),
        }
        for role in found
    ]
    rows = [["role", "version", "expires", "keys", ""]]
    for role in found:
        names = ", ".join(key[:8] for key in role.keys)
        keys = f"{role.threshold} of {names}" if names else "none: suspended"
        due = "ends soon: renew it" if place.is_ending(role) else "due" if role.is_due else ""
        rows.append([role.role, str(role.version), f"{role.expires:%Y-%m-%d %H:%M}", keys, due])
    return show(arguments, value, table(rows))


def _repository(arguments: argparse.Namespace) -> Repository:
    from fedge_server.release import ReleasePlace

    return ReleasePlace.of(Home.chosen(arguments.home).root).repository


def _public(paths: Sequence[Path], threshold: int) -> RoleKeys:
    from fedge.files import read_bounded
    from fedge_server.repository import RoleKeys, load_public
    from fedge_server.repository.keys import MAX_KEY_BYTES
    from fedge_server.signer.remote import RemoteSigning

    keys = []
    for path in paths:
        if path.is_socket():
            keys.append(RemoteSigning(path).key)
            continue
        try:
            keys.append(load_public(read_bounded(path, MAX_KEY_BYTES)))
        except FormatError as error:
            raise UserError(f"{path}: {error}; give the .pub file that lies beside a key") from error
    return RoleKeys(tuple(keys), threshold)


def _signing(arguments: argparse.Namespace) -> list[Signing]:
    from fedge_server.repository import load_key, passphrase_in
    from fedge_server.signer.remote import RemoteSigning

    found: list[Signing] = []
    for text in arguments.sign:
        if Path(text).is_socket():
            found.append(RemoteSigning(Path(text)))
            continue
        name, equals, file = text.partition("=")
        passphrase = passphrase_in(Path(file)) if equals else _asked(Path(name), twice=False)
        found.append(load_key(Path(name), passphrase=passphrase))
    return found


def _asked(path: Path, *, twice: bool) -> Passphrase | None:
    """Ask a person for a passphrase, once it is needed; None where there is no terminal.

    Raises:
        UserError: a key cannot be made without one.
    """
    if not sys.stdin.isatty():
        if twice:
            raise UserError(f"{path}: an offline key needs a passphrase; give --passphrase-file, or --online")
        return None

    def ask() -> bytes:
        from getpass import getpass

        given = getpass(f"passphrase of {path}: ")
        if twice and getpass("again: ") != given:
            raise UserError(f"{path}: the two passphrases differ; no key was made")
        return given.encode()

    return ask
