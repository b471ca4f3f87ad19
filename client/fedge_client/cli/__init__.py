"""`fedge-client`: join a server and train for it; install a release, ask it, go one release back."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedge import cli
from fedge.errors import DataError, FedgeError, FormatError, UserError
from fedge_client.cli import agent, enroll, preflight, serve, status
from fedge_client.device import Device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 the user's mistake."""
    parser = cli.parser(
        "fedge-client",
        "Be a device: train with its own data when asked; install, verify and run releases.",
        "  fedge-client install /mnt/published --tier micro --trust signing.pub\n"
        "  fedge-client infer picture.png\n"
        "  fedge-client status --format json",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_install(commands)
    _add_infer(commands)
    for name, run, summary in (
        ("status", status.run, "Show what is installed, where it comes from, and what the agent does."),
        ("preflight", preflight.run, "Check all that installing, answering and training need here."),
    ):
        made = cli.subcommand(
            commands,
            name,
            run,
            summary=summary,
            examples=f"  fedge-client {name}\n  fedge-client {name} --home /var/lib/fedge --format json",
        )
        _add_home(made)
        _add_format(made)
    made = cli.subcommand(
        commands,
        "rollback",
        _rollback,
        summary="Go back to the previous release, which is kept on this device. No network is needed.",
        examples="  fedge-client rollback",
    )
    _add_home(made)
    enroll.add(commands)
    agent.add(commands)
    serve.add(commands)
    return cli.run(parser, argv)


def _add_install(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    made = cli.subcommand(
        commands,
        "install",
        _install,
        summary="Install the newest release of a published folder. The first time, say which tier and key.",
        examples="  fedge-client install /mnt/published --tier micro --trust signing.pub   (first time)\n"
        "  fedge-client install /mnt/published                                    (afterwards)",
    )
    made.add_argument(
        "folder", type=Path, metavar="PUBLISHED_FOLDER", help="it holds release.json and objects/"
    )
    made.add_argument("--tier", help="the class of devices that this one belongs to; first time only")
    made.add_argument(
        "--trust",
        type=Path,
        action="append",
        metavar="KEY.pub",
        help="the publisher's public key; first time only",
    )
    made.add_argument("--again", action="store_true", help="take back a release that a rollback left")
    _add_home(made)


def _add_infer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    made = cli.subcommand(
        commands,
        "infer",
        _infer,
        summary="Ask the installed model about a file: a line with label and confidence for each example.",
        examples="  fedge-client infer picture.png\n  fedge-client infer rows.csv --format json\n"
        "  fedge-client infer --text 'To be, or not to b'",
    )
    made.add_argument(
        "file",
        type=Path,
        nargs="?",
        help="an image, .npy, .npz; for tables and signals .csv and .json too; for text .txt, .npy, .npz",
    )
    made.add_argument("--text", help="for a model of text, instead of a file: what comes next after it?")
    _add_home(made)
    _add_format(made)


def _add_home(parser: argparse.ArgumentParser) -> None:
    default = Path(os.environ.get("FEDGE_HOME") or Path.home() / ".fedge")
    parser.add_argument(
        "--home", type=Path, default=default, help="the device's folder (default: $FEDGE_HOME, else ~/.fedge)"
    )


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def _install(arguments: argparse.Namespace) -> int:
    from fedge_client.updater import Updater, folder_fetch

    if not arguments.folder.is_dir():
        raise UserError(
            f"{arguments.folder} is no folder; give the publisher's folder, which holds release.json"
        )
    fetch = folder_fetch(arguments.folder)
    first = not (arguments.home / "device.json").exists()
    device = _new_device(arguments) if first else _known_device(arguments)
    before = device.current()
    installed = Updater(device.home, device.tier, device.trusted, fetch).install(again=arguments.again)
    if before and before.identity == installed.identity:
        _say(f"nothing to do: release {installed.release.version} runs (tier {device.tier})")
        if before.left:
            _say(f"release {before.left} was left by a rollback; --again takes it back")
        return 0
    entry = installed.entry
    _say(
        f"installed release {installed.release.version} (tier {device.tier}, {entry.recipe}): "
        f"{entry.wire_bytes} bytes fetched, {entry.installed_bytes} installed"
    )
    return 0


def _new_device(arguments: argparse.Namespace) -> Device:
    """Make the device once the release is known to be good for it: a mistake leaves nothing behind."""
    from fedge_client.updater import Updater, folder_fetch

    if not arguments.tier or not arguments.trust:
        raise UserError(
            f"no device at {arguments.home}: the first time, give --tier TIER and --trust KEY.pub"
        )
    keys = [_read_key(path) for path in arguments.trust]
    Updater(arguments.home, arguments.tier, keys, folder_fetch(arguments.folder)).check()
    return Device.create(arguments.home, arguments.tier, keys)


def _known_device(arguments: argparse.Namespace) -> Device:
    device = Device.open(arguments.home)
    if arguments.tier not in (None, device.tier):
        raise UserError(f"this device is of tier {device.tier!r}; for {arguments.tier!r} make another --home")
    given = {_read_key(path) for path in arguments.trust or ()}
    if not given <= set(device.trusted):
        raise UserError("--trust: the keys of a device are fixed; for another one make another --home")
    return device


def _read_key(path: Path) -> bytes:
    from fedge import signing
    from fedge.files import read_bounded

    try:
        pem = read_bounded(path, signing.MAX_KEY_BYTES)
        signing.key_id(pem)
    except FormatError as error:
        raise UserError(f"--trust {path}: {error}") from error
    return pem


def _infer(arguments: argparse.Namespace) -> int:
    from fedge_client.runtime import Runtime, read_input, read_text

    if (arguments.file is None) == (arguments.text is None):
        raise UserError("infer: give a FILE, or --text TEXT for a model of text")
    runtime = Runtime.open(arguments.home)
    if arguments.text is None:
        examples = read_input(arguments.file, runtime.spec)
    else:
        try:
            examples = read_text(arguments.text, runtime.spec)
        except DataError as error:
            raise DataError(f"--text {error}") from error
    predictions = runtime.infer(examples)
    if arguments.format == "json":
        answers = [
            {"label": p.label, "confidence": p.confidence, "probabilities": dict(p.probabilities)}
            for p in predictions
        ]
        _say(json.dumps({"release": runtime.release.version, "predictions": answers}))
    else:
        for prediction in predictions:
            label = repr(prediction.label) if runtime.spec.kind == "text" else prediction.label
            _say(f"{label} {prediction.confidence:.4f}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from fedge_client.updater import Updater

    device = Device.open(arguments.home)
    back = Updater(device.home, device.tier, device.trusted, _no_fetch).return_to_previous()
    _say(
        f"returned to release {back.release.version}; "
        "to take the other one back: fedge-client install FOLDER --again"
    )
    return 0


def _no_fetch(name: str, maximum: int) -> bytes:
    raise FedgeError(f"{name}: a rollback reads nothing from elsewhere")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
