"""`fedge-server token`, `devices` and `ca`: who may connect.

These write to the database or the CA's folder, whether a hub is up or not, and then tell the hub to look.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import FedgeError, UserError
from fedge_server.cli.place import Place, add_home, opened, show, table

if TYPE_CHECKING:
    from fedge_server.hub.home import Home
    from fedge_server.identity.authority import Authority
    from fedge_server.registry.devices import DeviceRow, TokenRow

_TIMES = {"created", "expires", "used", "enrolled", "revoked", "last_seen", "certificate_not_after"}
_DOWN = "no hub is up; it counts from its next start"


def add(commands: Any) -> None:
    """Add the subcommands."""
    _add_token(_group(commands, "token", "one-time tokens that let devices enrol: create, ls, revoke"))
    _add_devices(_group(commands, "devices", "devices that have enrolled: ls, show, revoke"))
    _add_ca(_group(commands, "ca", "the certificate authority: status, rotate, finish"))


def _group(commands: Any, name: str, about: str) -> Any:
    made = commands.add_parser(name, help=about, description=about)
    return made.add_subparsers(required=True, metavar="COMMAND")


def _add_token(group: Any) -> None:
    made = cli.subcommand(
        group,
        "create",
        _token_create,
        summary="let devices enrol: prints a join string for each",
        examples="  fedge-server token create --tier micro\n"
        "  fedge-server token create --tier board --count 20 --ttl-h 168 --format json",
    )
    made.add_argument("--tier", required=True, help="the class of devices that the device will belong to")
    made.add_argument("--ttl-h", type=float, default=24.0, metavar="HOURS", help="how long it can be used")
    made.add_argument("--count", type=int, default=1, metavar="N", help="how many; each is for one device")
    add_home(made)
    example = "  fedge-server token ls"
    add_home(cli.subcommand(group, "ls", _token_ls, summary="list tokens, without secrets", examples=example))
    example = "  fedge-server token revoke 0123456789abcdef"
    made = cli.subcommand(group, "revoke", _token_revoke, summary="take a token back", examples=example)
    made.add_argument("which", metavar="ID", help="its id, or how the id begins")
    add_home(made)


def _add_devices(group: Any) -> None:
    example = "  fedge-server devices ls\n  fedge-server devices ls --format json"
    made = cli.subcommand(group, "ls", _devices_ls, summary="list devices", examples=example)
    add_home(made)
    example = "  fedge-server devices show 3fa1"
    made = cli.subcommand(group, "show", _devices_show, summary="show one device", examples=example)
    made.add_argument("which", metavar="ID", help="its id, or how the id begins")
    add_home(made)
    made = cli.subcommand(
        group,
        "revoke",
        _devices_revoke,
        summary="shut a device out: from its next call on, and for ever",
        examples='  fedge-server devices revoke 3fa1 --reason "stolen"',
    )
    made.add_argument("which", metavar="ID", help="its id, or how the id begins")
    made.add_argument("--reason", metavar="TEXT", help="kept, and told to the device")
    add_home(made)


def _add_ca(group: Any) -> None:
    example = "  fedge-server ca status"
    made = cli.subcommand(group, "status", _ca_status, summary="show CAs and certificates", examples=example)
    add_home(made)
    example = "  fedge-server ca rotate"
    made = cli.subcommand(
        group,
        "rotate",
        _ca_rotate,
        summary="begin to replace the CA: devices learn of the next one",
        examples=example,
    )
    add_home(made)
    made = cli.subcommand(
        group,
        "finish",
        _ca_finish,
        summary="drop the old CA, once every device knows the new one",
        examples="  fedge-server ca finish\n  fedge-server ca finish --force",
    )
    made.add_argument("--force", action="store_true", help="also when devices would be lost")
    add_home(made)


def _token_create(arguments: argparse.Namespace) -> int:
    from fedge_server.identity.tokens import new_join_string

    if not 1 <= arguments.count <= 10_000:
        raise UserError(f"--count {arguments.count}: must be 1 to 10000")
    with opened(arguments) as place:
        authority, names = _authority(place.home), place.settings.public.names
        port, now = _enrolment_port(place), time.time()
        made = [
            new_join_string(
                place.devices,
                arguments.tier,
                host=names[0],
                port=port,
                pin=authority.pin,
                hours=arguments.ttl_h,
                now=now,
            )
            for _ in range(arguments.count)
        ]
    expires = now + arguments.ttl_h * 3600
    value = [
        {"id": j.token_id, "tier": arguments.tier, "expires": _when(expires), "join": str(j)} for j in made
    ]
    return show(arguments, value, [str(join) for join in made])


def _enrolment_port(place: Place) -> int:
    """The port that devices are told: the settings', or the one that the hub has got."""
    if port := place.settings.listen.enrolment_port:
        return int(port)
    try:
        return int(json.loads(place.home.ports.read_text("utf-8"))["enrolment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "enrolment_port = 0 in server.toml: the port is known once the hub is up; start it, or "
            "name a port"
        ) from error


def _token_ls(arguments: argparse.Namespace) -> int:
    now = time.time()
    with opened(arguments) as place:
        rows = [_token_value(token, now) for token in place.devices.tokens()]
    lines = [(r["id"], r["tier"], r["state"], r["expires"], (r["used_by"] or "-")[:16]) for r in rows]
    head = ("id", "tier", "state", "expires", "device")
    return show(arguments, rows, table([head, *lines]) if rows else ["no tokens"])


def _token_value(token: TokenRow, now: float) -> dict[str, Any]:
    state = "used" if token.used_by else "expired" if now > token.expires else "open"
    names = ("id", "tier", "created", "expires", "used_by", "used")
    return _values(token, names) | {"state": state}


def _token_revoke(arguments: argparse.Namespace) -> int:
    with opened(arguments) as place:
        found = _one(arguments.which, [token.id for token in place.devices.tokens()], "token")
        place.devices.delete_token(found)
    return show(arguments, {"id": found}, [f"token {found} can no longer be used"])


def _devices_ls(arguments: argparse.Namespace) -> int:
    with opened(arguments) as place:
        rows = _device_values(place, place.devices.all())
    lines = [
        (
            r["id"][:16],
            r["tier"],
            _state(r),
            r["last_seen"] or "-",
            r["certificate_not_after"],
            r["fedge_version"],
        )
        for r in rows
    ]
    head = ("id", "tier", "state", "last seen", "certificate until", "fedge")
    return show(arguments, rows, table([head, *lines]) if rows else ["no devices"])


def _devices_show(arguments: argparse.Namespace) -> int:
    with opened(arguments) as place:
        rows = place.devices.all()
        found = _one(arguments.which, [row.id for row in rows], "device")
        (value,) = _device_values(place, [row for row in rows if row.id == found])
    lines = [f"{name:22} {'-' if item in (None, '') else item}" for name, item in value.items()]
    return show(arguments, value, lines)


def _device_values(place: Place, rows: Sequence[DeviceRow]) -> list[dict[str, Any]]:
    """Rows as they are shown; `online` is None when no hub is up, as `tags` and `tasks` are."""
    from fedge_server.hub import control

    reply, now = control.status(place.home), time.time()
    online = {device.device_id: device for device in reply.devices} if reply is not None else {}
    names = (
        "id", "node_id", "tier", "status", "reason", "enrolled", "revoked", "last_seen",
        "certificate_not_after", "wire_version", "fedge_version", "bundle",
    )  # fmt: skip
    values = []
    for row in rows:
        here = online.get(row.id)
        values.append(
            _values(row, names)
            | {
                "online": None if reply is None else here is not None,
                **({"last_seen": _when(now)} if here else {}),
                "tags": list(here.tags) if here else None,
                "tasks": list(here.tasks) if here else None,
            }
        )
    return values


def _devices_revoke(arguments: argparse.Namespace) -> int:
    from fedge_server.hub import control

    with opened(arguments) as place:
        found = _one(arguments.which, [row.id for row in place.devices.all()], "device")
        row = place.devices.revoke(found, arguments.reason or "")
        told = _told(place.home, f"device {found} is revoked in the database", control.refresh)
    line = f"revoked device {row.id}: " + ("the hub refuses it from now on" if told else _DOWN)
    return show(arguments, {"id": row.id, "status": row.status, "reason": row.reason, "hub": told}, [line])


def _told(home: Home, done: str, refresh: Any) -> bool:
    """Tell the hub; when it does not answer, say also what has been done already."""
    try:
        return bool(refresh(home))
    except FedgeError as error:
        raise FedgeError(f"{done}, but {error}") from error


def _ca_status(arguments: argparse.Namespace) -> int:
    with opened(arguments) as place:
        authority = _authority(place.home)
        value = _ca_value(place, authority)
    lines = [
        f"CA {ca['name']}: until {ca['not_after']}, signs {' and '.join(ca['signs'])}; pin {ca['pin']}"
        for ca in value["authorities"]
    ]
    server = value["server"]
    lines.append(f"server certificate: until {server['not_after']}, for {', '.join(server['names'])}")
    active, lacking = value["devices"], value["lacking"]
    if value["rotating"]:
        lines.append(f"rotation under way: {active - len(lacking)} of {active} devices know the new CA")
        lines += [f"  not yet: {device}" for device in lacking]
    return show(arguments, value, lines)


def _ca_value(place: Place, authority: Authority) -> dict[str, Any]:
    from fedge.identity import pins_of
    from fedge_server.identity.authority import ServerCertificate

    shown = ServerCertificate.load(place.home.tls)
    certificates = authority.certificates
    authorities = [
        {
            "name": certificate.subject.rfc4514_string().removeprefix("CN="),
            "pin": pin,
            "not_after": _when(certificate.not_valid_after_utc.timestamp()),
            "signs": [
                *(["the server"] if certificate == certificates[0] else []),
                *(["devices"] if certificate == certificates[-1] else []),
            ],
        }
        for certificate, pin in zip(certificates, pins_of(certificates), strict=True)
    ]
    return {
        "rotating": authority.rotating,
        "authorities": authorities,
        "server": {"not_after": _when(shown.not_after), "names": sorted(shown.names)},
        "devices": sum(row.status == "active" for row in place.devices.all()),
        "lacking": _lacking(place, authority),
    }


def _lacking(place: Place, authority: Authority) -> list[str]:
    """Active devices that have not said, or been sent, the newest bundle."""
    wanted = authority.bundle_digest
    return [row.id for row in place.devices.all() if row.status == "active" and row.bundle != wanted]


def _ca_rotate(arguments: argparse.Namespace) -> int:
    from fedge_server.hub import control

    with opened(arguments) as place:
        authority = _authority(place.home)
        authority.rotate()
        told = _told(place.home, "the new CA is made", control.refresh)
        value = _ca_value(place, authority) | {"hub": told}
    lines = [
        "a second CA signs devices' certificates from now on; the server's own stays with the first",
        "connected devices are told" if told else _DOWN,
        "when ca status shows that all know it: fedge-server ca finish",
    ]
    return show(arguments, value, lines)


def _ca_finish(arguments: argparse.Namespace) -> int:
    from fedge_server.hub import control

    with opened(arguments) as place:
        authority, now = _authority(place.home), time.time()
        lacking = _lacking(place, authority) if authority.rotating else []
        if lacking and not arguments.force:
            names = ", ".join(device[:16] for device in lacking[:10]) + (", ..." if len(lacking) > 10 else "")
            raise UserError(
                f"{len(lacking)} device(s) do not know the new CA yet: {names}; wait until they have "
                "connected, revoke them, or lose them with --force"
            )
        authority.finish()
        settings = place.settings
        days = settings.certificates.server_days
        authority.ensure_server_certificate(place.home.tls, settings.public.names, days)
        told = _told(place.home, "the old CA is dropped", control.refresh)
        open_tokens = [t.id for t in place.devices.tokens() if not t.used_by and now <= t.expires]
        value = _ca_value(place, authority) | {"hub": told, "lost": lacking, "open_tokens": open_tokens}
    lines = [f"the old CA is dropped; pin of the new one: {authority.pin}"]
    lines += [] if told else [_DOWN]
    if open_tokens:
        lines.append(
            f"{len(open_tokens)} join string(s) that nobody has used name the old CA: make new ones "
            "(token create) and take these back (token revoke)"
        )
    return show(arguments, value, lines)


def _authority(home: Home) -> Authority:
    from fedge_server.identity.authority import Authority

    return Authority.open(home.ca)


def _one(which: str, known: Sequence[str], kind: str) -> str:
    """The id that begins so.

    Raises:
        UserError: none does, or several.
    """
    found = [item for item in known if item == which] or [
        item for item in known if which and item.startswith(which)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{kind} {which!r}: {len(found)} ids begin so: {', '.join(sorted(found)[:5])}; give more of it"
        )
    listing = "token ls" if kind == "token" else "devices ls"
    raise UserError(f"{kind} {which!r}: there is none; list them with: fedge-server {listing}")


def _state(row: dict[str, Any]) -> str:
    if row["status"] != "active":
        return str(row["status"])
    return {None: "active", True: "online", False: "offline"}[row["online"]]


def _values(row: DeviceRow | TokenRow, names: Sequence[str]) -> dict[str, Any]:
    """Fields of a row as JSON shows them: times in ISO 8601."""
    found = {name: getattr(row, name) for name in names}
    return {name: _when(value) if name in _TIMES else value for name, value in found.items()}


def _when(seconds: float | None) -> str | None:
    from fedge_server.identity.admission import show_time

    return None if seconds is None else show_time(seconds)
