"""`fedge-client preflight`: try each thing that an answer, an installation or training will need."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from fedge.errors import FedgeError, UserError
from fedge_client.device import Device, exists, root_version

_MIN_FREE_BYTES: Final = 16 * 1024**2  # below this a next installation is doubtful
_CLOCK_SLACK_S: Final = 24 * 3600  # a clock may lag the publisher's by this much

Check = Callable[[], str]
"""Says what it found; raises FedgeError or OSError when that will not do."""


def run(arguments: argparse.Namespace) -> int:
    """Every check is tried, whatever fails; exit code 1 when one does."""
    results = {name: _tried(check, arguments.home) for name, check in _checks(arguments.home)}
    if arguments.format == "json":
        found = {name: {"ok": ok, "detail": detail} for name, (ok, detail) in results.items()}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for name, (ok, detail) in results.items():
            sys.stdout.write(f"{'ok  ' if ok else 'FAIL'} {name}: {detail}\n")
    return 0 if all(ok for ok, _ in results.values()) else 1


def _tried(check: Check, home: Path) -> tuple[bool, str]:
    try:
        return True, check()
    except FedgeError as error:
        return False, str(error)
    except OSError as error:
        return False, f"{error.filename or home}: {error.strerror}"


def _checks(home: Path) -> Iterator[tuple[str, Check]]:
    """What this device is for decides what it needs: releases, training, or both."""
    enrolled = (home / "identity" / "hub.json").exists()
    yield "home", partial(_home, home)
    yield "space", partial(_space, home)
    if exists(home) or not enrolled:
        yield "trust", partial(_trust, home)
        yield "clock", partial(_clock, home)
        yield "model", partial(_model, home, enrolled)
    if enrolled:
        from fedge_client.agent import checks

        yield from checks.of(home)


def _home(home: Path) -> str:
    from fedge.files import write_atomically

    if not (home / "identity" / "hub.json").exists() and not exists(home):
        raise UserError(f"no device at {home}; begin with fedge-client install, or fedge-client enroll")
    probe = home / ".preflight"
    write_atomically(probe, b"")
    probe.unlink()
    return f"{home} can be written"


def _space(home: Path) -> str:
    free = shutil.disk_usage(home).free
    if free < _MIN_FREE_BYTES:
        raise FedgeError(f"{free} bytes are free, under {_MIN_FREE_BYTES}; make room")
    return f"{free} bytes are free"


def _trust(home: Path) -> str:
    device = Device.open(home)
    given, known = root_version(device.root), device.metadata()
    roles = ", ".join(f"{role} {found.version} until {found.expires}" for role, found in known.items())
    return f"tier {device.tier}, given root {given}; verified: {roles or 'nothing yet'}"


def _clock(home: Path) -> str:
    """The clock must not lag the newest thing that this device has verified."""
    now, device = datetime.now(UTC), Device.open(home)
    if device.store.state().current is not None:
        created = device.running()[0].release.created
        if time.time() < datetime.fromisoformat(created).timestamp() - _CLOCK_SLACK_S:
            raise FedgeError(
                f"it says {now:%Y-%m-%d}, before the installed release was made ({created}); set the clock"
            )
    return f"{now:%Y-%m-%dT%H:%M:%SZ}"


def _model(home: Path, enrolled: bool) -> str:
    from fedge_client.runtime import Runtime

    if enrolled and Device.open(home).store.state().current is None:
        return "none is installed yet"
    runtime = Runtime.open(home)
    runtime.infer(runtime.spec.zeros(1))
    if runtime.installed.damaged:
        raise FedgeError(f"{runtime.installed.damaged}; until then release {runtime.release.version} answers")
    return f"release {runtime.release.version} loads and answers"
