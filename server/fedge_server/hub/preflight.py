"""Whether a hub could be up in a home: each thing that must be right, and what to do where it is not."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from fedge.errors import FedgeError
from fedge_server.hub import control
from fedge_server.hub.home import Home
from fedge_server.hub.server import MAX_SOCKET_PATH, read_ports
from fedge_server.hub.settings import Settings
from fedge_server.identity.admission import show_time
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.registry.engine import connect, reading
from fedge_server.registry.schema import HEAD
from fedge_server.release.place import ONLINE, ReleasePlace

LOW_DISK_BYTES: Final = 1024**3
_DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    good: bool
    detail: str


def check(home: Home) -> list[Finding]:
    """Look at everything; what needs the settings is left out when they cannot be read."""
    try:
        settings = Settings.load(home.settings)
    except FedgeError as error:
        return [Finding("settings", False, str(error))]
    found = [Finding("settings", True, str(home.settings))]
    for what, look in (
        ("authority", lambda: _authority(home)),
        ("certificate", lambda: _certificate(home, settings)),
        ("keys", lambda: _keys(home)),
        ("repository", lambda: _repository(home)),
        ("signers", lambda: _signers(home)),
        ("database", lambda: _database(home, settings)),
        ("disk", lambda: _disk(home)),
        ("socket", lambda: _socket(home)),
    ):
        found.append(_one(what, look))
    return [*found, *_ports(home, settings), *_names(settings)]


def _one(what: str, look: Callable[[], str]) -> Finding:
    """A finding is good unless the look raises."""
    try:
        return Finding(what, True, look())
    except (FedgeError, OSError) as error:
        return Finding(what, False, str(error))


def _authority(home: Home) -> str:
    ends = [found.not_valid_after_utc.timestamp() for found in Authority.open(home.ca).certificates]
    if min(ends) < time.time() + 30 * _DAY_S:
        raise FedgeError(f"a CA ends at {show_time(min(ends))}; begin a rotation: fedge-server ca rotate")
    return f"{len(ends)} CA, until {show_time(min(ends))}"


def _certificate(home: Home, settings: Settings) -> str:
    if not (home.tls / "server.pem").exists():
        return "made at the first start"
    found = ServerCertificate.load(home.tls)
    if found.not_after < time.time():
        return f"expired at {show_time(found.not_after)}; renewed at the next start"
    if missing := sorted({name.lower() for name in settings.public.names} - set(found.names)):
        return f"does not name {', '.join(missing)} yet; made anew at the next start"
    return f"for {', '.join(sorted(found.names))}, until {show_time(found.not_after)}"


def _keys(home: Home) -> str:
    looked = 0
    for folder in (home.ca, home.tls, home.root / "keys"):
        for path in [folder, *folder.glob("*")] if folder.is_dir() else []:
            secret = path.is_dir() or path.suffix in (".pem", ".key")
            if secret and path.stat().st_mode & 0o077:
                raise FedgeError(f"{path}: others may read it; run: chmod go= {path}")
            looked += secret
    return f"{looked} files and folders that only their owner may read"


def _repository(home: Home) -> str:
    """Stops a fleet that accepts nothing any more, because metadata has expired unnoticed."""
    place = ReleasePlace.of(home.root)
    if not place.repository.is_there:
        raise FedgeError("there is none, so nothing can be released; run: fedge-server keys make")
    found = place.repository.status()
    if soon := [role for role in found if place.is_ending(role)]:
        ends = ", ".join(f"{role.role} ends {role.expires:%Y-%m-%d %H:%M}" for role in soon)
        raise FedgeError(f"{ends}; run: fedge-server keys refresh (snapshot, timestamp) or keys renew ROLE")
    missing = [role for role in ONLINE if role not in place.at_hand().top]
    if missing:
        raise FedgeError(f"{place.keys / missing[0]}.key is not here: nothing can be published or refreshed")
    tiers = ", ".join(sorted(place.tiers())) or "none yet"
    return f"tiers: {tiers}; the first role ends {min(role.expires for role in found):%Y-%m-%d %H:%M}"


def _signers(home: Home) -> str:
    found = ReleasePlace.of(home.root).at_hand()
    if found.away:
        raise FedgeError(f"{'; '.join(found.away)}: releases of its tier will await a signature")
    return f"keys or signers of {', '.join(sorted(found.tiers)) or 'no tier'} are at hand"


def _database(home: Home, settings: Settings) -> str:
    if not settings.database.url and not home.database.exists():
        return "made at the first start"
    engine = connect(home.root, settings.database_url)
    try:
        with reading(engine) as connection:
            known = sa.inspect(connection).has_table("alembic_version")
            found = (
                str(connection.scalar(sa.text("SELECT version_num FROM alembic_version"))) if known else ""
            )
    finally:
        engine.dispose()
    if found > HEAD:
        raise FedgeError(f"schema {found}, but this fedge knows {HEAD}; install the newer fedge again")
    return f"schema {found}" if found == HEAD else f"schema {found or 'none'}, {HEAD} from the next start on"


def _disk(home: Home) -> str:
    free = shutil.disk_usage(home.root).free
    if free < LOW_DISK_BYTES:
        raise FedgeError(f"{free / 1e9:.1f} GB free at {home.root}; make room for models and updates")
    return f"{free / 1e9:.1f} GB free"


def _socket(home: Home) -> str:
    if len(str(home.socket).encode()) > MAX_SOCKET_PATH:
        raise FedgeError(f"{home.socket}: too long for a unix socket; give a home with a shorter path")
    return "a hub is up" if control.is_up(home) else "no hub is up"


def _ports(home: Home, settings: Settings) -> Iterator[Finding]:
    listen = settings.listen
    ours = read_ports(home) if control.is_up(home) else {}
    for name, port in (("link", listen.link_port), ("enrolment", listen.enrolment_port)):
        what = f"port of {name}"
        if name in ours:
            yield Finding(what, True, f"{ours[name]}, held by the hub that is up")
        elif port == 0:
            yield Finding(what, True, "any free one")
        else:
            yield _one(what, lambda port=port: _free(listen.host, port))  # type: ignore[misc]


def _free(host: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FedgeError(f"{host}:{port}: {error.strerror}; change it in server.toml") from error
    return f"{port} is free"


def _names(settings: Settings) -> Iterator[Finding]:
    for name in settings.public.names:
        try:
            found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
        except OSError as error:
            yield Finding(f"name {name}", False, f"does not resolve here ({error}); devices may not find it")
        else:
            yield Finding(f"name {name}", True, ", ".join(found))
