"""`fedge-sim`: simulate many clients on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli

if TYPE_CHECKING:
    from fedge.config import Config

_RUN_EXAMPLES = """\
  fedge-sim run examples/digits.toml --out out/digits
  fedge-sim run examples/fashion_mnist.toml --set data=fashion.npz --set rounds.count=5 --out out/fashion
  fedge-sim run mine.toml --out out/mine            (again after a crash: goes on from the last round)"""
_DEMO_EXAMPLES = """\
  fedge-sim demo
  fedge-sim demo --out /tmp/demo --set rounds.count=5"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 done, 1 the work failed, 2 the user's mistake."""
    parser = cli.parser(
        "fedge-sim",
        "Simulate a federation: rounds, compression, release and devices.",
        f"{_DEMO_EXAMPLES}\n{_RUN_EXAMPLES}",
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
        command.add_argument(
            "--format", choices=("text", "json"), default="text", help="json: only the summary, on stdout"
        )
    return cli.run(parser, argv)


def _run(arguments: argparse.Namespace) -> int:
    from fedge.config import Config

    return _simulate(Config.load(arguments.config, arguments.overrides), arguments)


def _demo(arguments: argparse.Namespace) -> int:
    from fedge.config import Config
    from fedge_simulations.demo import demonstrate

    source = Path(str(files("fedge_simulations").joinpath("demo.toml")))
    summary = demonstrate(
        Config.load(source, arguments.overrides),
        source,
        arguments.overrides,
        arguments.out,
        overwrite=arguments.overwrite,
        say=_silent if arguments.format == "json" else _say,
    )
    _show(summary, arguments)
    variants, devices = summary.get("variants", []), summary.get("devices", [])
    return (
        0 if all(v["gate"] == "passed" for v in variants) and all(d["same_as_gate"] for d in devices) else 1
    )


def _simulate(config: Config, arguments: argparse.Namespace) -> int:
    from fedge_simulations.simulate import run

    quiet = arguments.format == "json"
    result = run(
        config,
        arguments.out,
        overwrite=arguments.overwrite,
        say=_silent if quiet else _say,
        observe=_silent if quiet else _round_line(config),
    )
    _show(result.summary, arguments)
    return 0 if result.complete else 1


def _show(summary: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.format == "json":
        _say(json.dumps(summary, indent=2))
        return
    _tables(summary)
    _say(f"\nwritten: {arguments.out}/report.html, summary.json, history.jsonl, model.safetensors")


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - this is the command's output


def _silent(_: Any) -> None:
    pass


def _round_line(config: Config) -> Any:
    from fedge_server.pipeline import round_line

    return lambda record: _say(round_line(config, record))


def _tables(summary: dict[str, Any]) -> None:
    model = summary["global_model"]
    auc = f", AUC {model['auc']:.4f}" if "auc" in model else ""
    _say(
        f"\nglobal model: accuracy {model['accuracy']:.4f}{auc} on held-out data, "
        f"{model['parameters']:,} parameters, {model['bytes']:,} bytes"
    )
    if variants := summary.get("variants"):
        _tier_table(variants, model["bytes"])
    for entry in summary.get("devices", []):
        same = "the same" if entry["same_as_gate"] else "OTHER"
        _say(
            f"device {entry['id']}: release {entry['release']}, accuracy {entry['accuracy']:.4f}, "
            f"{same} answers as the gate scored"
        )
    for entry in summary.get("leave_one_client_out", []):
        auc = f"AUC {entry['auc']:.3f}, " if "auc" in entry else ""
        scores = f"{auc}accuracy {entry['accuracy']:.3f}"
        _say(f"without client {entry['client']}, tested on its {entry['examples']}: {scores}")


def _tier_table(variants: list[dict[str, Any]], teacher_bytes: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\none compact version per tier", title_justify="left", box=None, pad_edge=False)
    for name in (
        "tier",
        "recipe",
        "bytes",
        "times smaller",
        "accuracy",
        "points lost",
        "at most",
        "µs",
        "gate",
    ):
        table.add_column(
            name, no_wrap=True, justify="left" if name in ("tier", "recipe", "gate") else "right"
        )
    for variant in variants:
        table.add_row(*_tier_row(variant, teacher_bytes))
    # In a pipe rich assumes 80 columns and would cut the table.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(table)
    for variant in variants:
        if "wire_bytes" not in variant:
            _say(f"tier {variant['tier']} gets no variant: {variant['gate'].removeprefix('failed: ')}")


def _tier_row(variant: dict[str, Any], teacher_bytes: int) -> list[str]:
    if "wire_bytes" not in variant:
        return [variant["tier"], "none", "", "", "", "", "", "", "failed"]
    return [
        variant["tier"],
        variant["recipe"],
        f"{variant['wire_bytes']:,}",
        f"{teacher_bytes / variant['wire_bytes']:.1f}",
        f"{variant['accuracy']:.4f}",
        f"{100 * variant['drop']:.2f}",
        f"{100 * variant['drop_upper']:.2f}",
        f"{variant['latency_us']:.0f}",
        variant["gate"],
    ]
