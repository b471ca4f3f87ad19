"""`fedge-client`: join a server and train for it; install a release, ask it, go one release back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedge import cli
from fedge.errors import DataError, UserError
from fedge_client.cli import agent, enroll, install, memory, preflight, serve, status

if TYPE_CHECKING:
    from fedge_client.agent.settings import AskingSettings
    from fedge_client.joint.joint import Answer, Local


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 the work failed, 2 the user's mistake."""
    parser = cli.parser(
        "fedge-client",
        "Be a device: train with its own data when asked; install, verify and run releases.",
        "  fedge-client install /mnt/stick --tier micro --root 1.root.json\n"
        "  fedge-client infer picture.png\n"
        "  fedge-client status --format json",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    install.add(commands)
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
        agent.add_home(made)
        _add_format(made)
    enroll.add(commands)
    agent.add(commands)
    serve.add(commands)
    memory.add(commands)
    return cli.run(parser, argv)


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
    made.add_argument(
        "--local", action="store_true", help="do not ask the cloud, whatever [joint] in agent.toml says"
    )
    agent.add_home(made)
    _add_format(made)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def _infer(arguments: argparse.Namespace) -> int:
    from fedge.fitting import fit
    from fedge_client.agent import settings
    from fedge_client.answers import count
    from fedge_client.joint.joint import Local
    from fedge_client.runtime import Runtime, read_input, read_text
    from fedge_client.serving.answered import Answered, answer_json
    from fedge_client.telemetry.counting import count_once

    if (arguments.file is None) == (arguments.text is None):
        raise UserError("infer: give a FILE, or --text TEXT for a model of text")
    own = settings.load(arguments.home / settings.FILE)
    telemetry = own.telemetry.collecting()
    runtime = Runtime.open(arguments.home)
    if arguments.text is None:
        examples = read_input(arguments.file, runtime.spec)
    else:
        try:
            examples = read_text(arguments.text, runtime.spec)
        except DataError as error:
            raise DataError(f"--text {error}") from error
    began = time.monotonic()
    local = Local.of(runtime, fit(examples, runtime.spec), runtime.infer(examples))
    asks = own.joint.enabled and not arguments.local
    answers = _asked(arguments.home, own.joint, local) if asks else local.alone("alone")
    found = Answered.of(local, answers, time.monotonic() - began)
    count(arguments.home, found.version, (prediction.confidence for prediction in found.own))
    if telemetry is not None:
        count_once(arguments.home, telemetry, runtime, found)
    if arguments.format == "json":
        _say(json.dumps(answer_json(found)))
        return 0
    for prediction, source, why in zip(found.predictions, found.route, found.why, strict=True):
        label = repr(prediction.label) if runtime.spec.kind == "text" else prediction.label
        _say(f"{label} {prediction.confidence:.4f}" + (f" {source} ({why})" if asks else ""))
    return 0


def _asked(home: Path, asking: AskingSettings, local: Local) -> list[Answer]:
    """The device's answers, with the cloud's in place of those that it doubts."""
    import asyncio

    from fedge_client.joint.asking import asking_of

    async def ask() -> list[Answer]:
        async with asking_of(home, asking) as joint:
            return await joint.complete(local, time.monotonic() + asking.deadline_s)

    return asyncio.run(ask())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
