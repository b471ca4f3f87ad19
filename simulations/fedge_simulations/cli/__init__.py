"""`fedge-sim`: simulate many clients on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge_simulations.cli import studies
from fedge_simulations.cli.output import add_format, say, show, silent

if TYPE_CHECKING:
    from fedge.config import Config
    from fedge_server.rounds.record import RoundRecord

_RUN_EXAMPLES = """\
  fedge-sim run examples/digits.toml --out out/digits
  fedge-sim run examples/fashion_mnist.toml --set data=fashion.npz --set rounds.count=5 --out out/fashion
  fedge-sim run mine.toml --out out/mine --tensorboard out/events
  fedge-sim run mine.toml --out out/mine            (again after a crash: goes on from the last round)"""
_DEMO_EXAMPLES = """\
  fedge-sim demo
  fedge-sim demo --out /tmp/demo --set rounds.count=5"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 the work failed, 2 the user's mistake."""
    parser = cli.parser(
        "fedge-sim",
        "Simulate a federation: rounds, compression, release and devices.",
        f"{_DEMO_EXAMPLES}\n{_RUN_EXAMPLES}\n{studies.EXAMPLES}",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = cli.subcommand(commands, "run", _run, summary="simulate a configuration", examples=_RUN_EXAMPLES)
    run.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="what to learn, with whom, for which tiers"
    )
    run.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder; an interrupted run in it is resumed",
    )
    demo = cli.subcommand(
        commands,
        "demo",
        _demo,
        summary="the whole loop: a hub and four agents on loopback learn digits, in about a minute",
        examples=_DEMO_EXAMPLES,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-out"), metavar="DIR", help="run folder (default demo-out)"
    )
    for command in (run, demo):
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                             help="change a key of the configuration, such as rounds.count=5")  # fmt: skip
        command.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
        add_format(command, "only the summary, on stdout")
    run.add_argument("--tensorboard", type=Path, metavar="DIR",
                     help="also write the rounds there as TensorBoard's events")  # fmt: skip
    studies.add(commands)
    return cli.run(parser, argv)


def _run(arguments: argparse.Namespace) -> int:
    from fedge.config import Config

    return _simulate(Config.load(arguments.config, arguments.overrides), arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from fedge.config import Config
    from fedge_simulations.demo import demonstrate

    source = Path(str(files("fedge_simulations").joinpath("demo.toml")))
    summary, said = demonstrate(
        Config.load(source, arguments.overrides),
        source,
        arguments.overrides,
        arguments.out,
        overwrite=arguments.overwrite,
        say=silent if arguments.format == "json" else say,
    )
    show(summary, arguments)
    if arguments.format == "text":
        say("")
        for line in said:
            say(line)
    variants, devices = summary.get("variants", []), summary.get("devices", [])
    return (
        0 if all(v["gate"] == "passed" for v in variants) and all(d["same_as_gate"] for d in devices) else 1
    )


def _simulate(config: Config, arguments: argparse.Namespace) -> int:
    from fedge_simulations.live import watching
    from fedge_simulations.runs import committed
    from fedge_simulations.simulate import run
    from fedge_simulations.tensorboard import exporting

    earlier = 0 if arguments.overwrite else committed(arguments.out, config)
    with ExitStack() as stack:
        observers: list[Callable[[Any], None]] = []
        if arguments.tensorboard is not None:
            observers.append(stack.enter_context(exporting(arguments.tensorboard, config)))
        tell: Callable[[str], None] = silent
        if arguments.format == "text":
            view = stack.enter_context(watching(config, earlier=earlier))
            observers.append(view.observe)
            tell = view.say

        def observe(record: RoundRecord) -> None:
            for observer in observers:
                observer(record)

        result = run(config, arguments.out, overwrite=arguments.overwrite, say=tell, observe=observe)
    show(result.summary, arguments)
    return 0 if result.complete else 1
