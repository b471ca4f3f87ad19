"""`fedge-client`: join a server and train for it; install a release, ask it, go one release back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedge import cli
from fedge.errors import DataError, UserError
from fedge_client.cli import agent, enroll, install, memory, preflight, serve, status


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
    agent.add_home(made)
    _add_format(made)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def _infer(arguments: argparse.Namespace) -> int:
    from fedge.fitting import fit
    from fedge_client.agent import settings
    from fedge_client.answers import count
    from fedge_client.runtime import Runtime, read_input, read_text
    from fedge_client.telemetry.counting import count_once

    if (arguments.file is None) == (arguments.text is None):
        raise UserError("infer: give a FILE, or --text TEXT for a model of text")
    telemetry = settings.load(arguments.home / settings.FILE).telemetry.collecting()
    runtime = Runtime.open(arguments.home)
    if arguments.text is None:
        examples = read_input(arguments.file, runtime.spec)
    else:
        try:
            examples = read_text(arguments.text, runtime.spec)
        except DataError as error:
            raise DataError(f"--text {error}") from error
    started = time.perf_counter()
    predictions = runtime.infer(examples)
    took_s = time.perf_counter() - started
    count(arguments.home, runtime.release.version, (prediction.confidence for prediction in predictions))
    if telemetry is not None:
        count_once(arguments.home, telemetry, runtime, fit(examples, runtime.spec), predictions, took_s)
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


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
