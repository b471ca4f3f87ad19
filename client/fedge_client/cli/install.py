"""`fedge-client install` and `rollback`: which release runs on this device."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedge import cli
from fedge.delivery import MAX_ROOT_BYTES
from fedge.errors import FedgeError, FormatError, UserError
from fedge.files import read_bounded
from fedge_client.cli.agent import add_home
from fedge_client.device import Device, exists, root_version


def add(commands: Any) -> None:
    """Add the subcommands."""
    made = cli.subcommand(
        commands,
        "install",
        _install,
        summary="Install what the server has for this device, or the newest release of a repository.",
        examples="  fedge-client install                                              (an enrolled device)\n"
        "  fedge-client install /mnt/stick --tier micro --root 1.root.json   (from a folder, first time)\n"
        "  fedge-client install /mnt/stick                                   (afterwards)",
    )
    made.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="a repository: it holds metadata/ and targets/; without it an enrolled device asks its server",
    )
    made.add_argument("--tier", help="the class of devices that this one belongs to; first time only")
    made.add_argument(
        "--root",
        type=Path,
        metavar="ROOT.json",
        help="the repository's root metadata, got by a way that you trust; first time only",
    )
    made.add_argument("--again", action="store_true", help="take back a release that a rollback left")
    add_home(made)
    made = cli.subcommand(
        commands,
        "rollback",
        _rollback,
        summary="Go back to the previous release, which is kept on this device. No network is needed.",
        examples="  fedge-client rollback",
    )
    add_home(made)


def _install(arguments: argparse.Namespace) -> int:
    return _from_server(arguments) if arguments.folder is None else _from_folder(arguments)


def _from_server(arguments: argparse.Namespace) -> int:
    """Ask once which version is for this device, install it, and say what became of it."""
    from fedge_client.agent.identity import Identity, is_enrolled
    from fedge_client.agent.installation import bring
    from fedge_client.agent.standing import Done, standing
    from fedge_client.delivery import Delivery
    from fedge_client.reports import Reports

    if not is_enrolled(arguments.home):
        raise UserError(
            f"{arguments.home}: not enrolled; give the FOLDER of a repository, or run fedge-client enroll"
        )
    if arguments.tier or arguments.root or arguments.again:
        raise UserError("install: --tier, --root and --again are for a FOLDER; the server says which version")
    device, reports = Device.open(arguments.home), Reports(arguments.home)
    with Delivery(lambda: Identity.open(arguments.home)) as service:
        here = standing(device, tags=_tags(arguments.home))
        answer = service.poll(here)
        told = answer.version
        news = answer.root > here.root or answer.tier_role > here.tier_role
        done = bring(device, service.fetch, told) if told or news else Done(here.has)
        if waiting := reports.waiting():
            service.note(waiting)
            reports.drop(waiting)
    if done.fault:
        raise FedgeError(f"release {told}: {done.fault}" if told else done.fault)
    if done.changed:
        _say(f"installed release {done.version} (tier {device.tier}) from the server")
    elif done.version:
        _say(f"nothing to do: release {done.version} runs (tier {device.tier})")
    else:
        _say(f"nothing to install: the server has no release for this device now (tier {device.tier})")
    return 0


def _tags(home: Path) -> tuple[str, ...]:
    from fedge_client.agent import settings

    return settings.load(home / settings.FILE).tags


def _from_folder(arguments: argparse.Namespace) -> int:
    from fedge_client.installing import install
    from fedge_client.updater.streams import folder

    if not (arguments.folder / "metadata").is_dir():
        raise UserError(
            f"{arguments.folder} is no repository; give the folder that holds metadata/ and targets/"
        )
    device = _known_device(arguments) if exists(arguments.home) else _new_device(arguments)
    left = device.store.state().left
    outcome = install(device, folder(arguments.folder), again=arguments.again)
    current = outcome.state.current
    if outcome.offered is None:
        _say(f"nothing to install: tier {device.tier} has no release yet")
    elif not outcome.changed:
        _say(f"nothing to do: release {current.version if current else 0} runs (tier {device.tier})")
        if left:
            _say(f"release {left} was left by a rollback; --again takes it back")
    else:
        release, entry = outcome.offered.release, outcome.offered.release.variant(device.tier)
        _say(
            f"installed release {release.version} (tier {device.tier}, {entry.recipe}): "
            f"{outcome.offered.artefact.length} bytes fetched, {entry.installed_bytes} installed"
        )
    return 0


def _new_device(arguments: argparse.Namespace) -> Device:
    """Make the device once the release is known to be good for it: a mistake leaves nothing behind."""
    from fedge_client.installing import look
    from fedge_client.updater.streams import folder

    if not arguments.tier or not arguments.root:
        raise UserError(
            f"no device at {arguments.home}: the first time, give --tier TIER and --root 1.root.json"
        )
    root = _read_root(arguments.root)
    look(arguments.tier, root, folder(arguments.folder))
    return Device.create(arguments.home, arguments.tier, root)


def _known_device(arguments: argparse.Namespace) -> Device:
    device = Device.open(arguments.home)
    if arguments.tier not in (None, device.tier):
        raise UserError(f"this device is of tier {device.tier!r}; for {arguments.tier!r} make another --home")
    if arguments.root is not None and _read_root(arguments.root) != device.root:
        raise UserError(
            "--root: a device is given its root once, and follows the repository's changes of it; "
            "for another repository make another --home"
        )
    return device


def _read_root(path: Path) -> bytes:
    try:
        data = read_bounded(path, MAX_ROOT_BYTES)
        root_version(data)
    except FormatError as error:
        raise UserError(f"--root {path}: {error}") from error
    return data


def _rollback(arguments: argparse.Namespace) -> int:
    from fedge_client.installing import return_to_previous

    back = return_to_previous(Device.open(arguments.home))
    _say(
        f"returned to release {back.version}; to take the other one back: fedge-client install FOLDER --again"
    )
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
