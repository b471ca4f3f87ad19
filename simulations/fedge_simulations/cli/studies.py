"""`fedge-sim compare` and `fedge-sim sweep`: several runs together."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import FedgeError, UserError
from fedge_simulations.cli.output import add_format, plain_table, say

if TYPE_CHECKING:
    from fedge_simulations.compare import Comparison
    from fedge_simulations.sweep import Planned
    from fedge_simulations.sweeping import Outcome

_COMPARE_EXAMPLES = """\
  fedge-sim compare out/fedavg-seed0 out/fedavg-seed1 out/fedprox-seed0 out/fedprox-seed1 --out compare.html
  fedge-sim compare out/sweep --target "accuracy>=0.95" --format json"""
_SWEEP_EXAMPLES = """\
  fedge-sim sweep digits.toml --set 'train.learning_rate=[0.01,0.1]' --set 'seed=[0,1,2]' --out out/lr
  fedge-sim sweep mine.toml --set 'strategy.name=[fedavg,fedprox]' --out out/rules --parallel 2
  fedge-sim sweep mine.toml --set 'train.augment=[["flip"],["flip","shift:1"]]' --out out/augment --dry-run"""
EXAMPLES = f"{_COMPARE_EXAMPLES.splitlines()[0]}\n{_SWEEP_EXAMPLES.splitlines()[0]}"


def add(commands: Any) -> None:
    """Add the subcommands."""
    compare = cli.subcommand(
        commands,
        "compare",
        _compare,
        summary="compare runs, finished or not; those that differ in the seed alone are one group",
        examples=_COMPARE_EXAMPLES,
    )
    compare.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="a run folder, or a folder of them such as a sweep's",
    )
    compare.add_argument("--out", type=Path, metavar="FILE.html", help="also write a page with plots")
    _add_measures(compare)
    add_format(compare, "the comparison, on stdout")
    _add_sweep(commands)


def _add_sweep(commands: Any) -> None:
    sweep = cli.subcommand(
        commands,
        "sweep",
        _sweep,
        summary="run every combination of lists of values, and compare the runs; again: only what is missing",
        examples=_SWEEP_EXAMPLES,
    )
    sweep.add_argument("config", type=Path, metavar="CONFIG.toml", help="what all runs have in common")
    sweep.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                       help="a list of values is swept over; another value holds for all runs")  # fmt: skip
    sweep.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the run folders and of compare.html"
    )
    sweep.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="runs at once; they share the cores out"
    )
    sweep.add_argument("--overwrite", action="store_true", help="do finished runs again")
    sweep.add_argument("--dry-run", action="store_true", help="only list the runs")
    sweep.add_argument("--tensorboard", type=Path, metavar="DIR",
                       help="also write events there, in a folder for each run")  # fmt: skip
    _add_measures(sweep)
    add_format(sweep, "the runs and their comparison, on stdout")


def _add_measures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metric", metavar="NAME", help="compare by it (default: the target's, else accuracy)"
    )
    parser.add_argument(
        "--target",
        metavar="TARGET",
        help="such as 'accuracy>=0.95' (default: rounds.target, where all share it)",
    )


def _compare(arguments: argparse.Namespace) -> int:
    from fedge_simulations.compare import compare
    from fedge_simulations.compare_page import write_comparison

    comparison = compare(arguments.folders, metric=arguments.metric, target=arguments.target)
    if arguments.out is not None:
        write_comparison(arguments.out, comparison)
    if arguments.format == "json":
        say(json.dumps(comparison.to_json(), indent=2))
        return 0
    show_comparison(comparison)
    if arguments.out is not None:
        say(f"\nwritten: {arguments.out}")
    return 0


def show_comparison(comparison: Comparison) -> None:
    """Print tables and notes."""
    from fedge_simulations.compare_page import columns, difference_row, row

    plain_table(columns(comparison), [row(comparison, g) for g in comparison.groups], left=("group",))
    if comparison.differences:
        say(f"\nfinal {comparison.metric} minus that of {comparison.differences[0].baseline}, seed by seed")
        rows = [difference_row(difference) for difference in comparison.differences]
        plain_table(("group", "difference", "n"), rows, left=("group",))
    for note in comparison.notes:
        say(f"note: {note}")


def _sweep(arguments: argparse.Namespace) -> int:
    from fedge_simulations.sweep import plan
    from fedge_simulations.sweep_view import watching
    from fedge_simulations.sweeping import Heard, Manner, sweep

    if arguments.parallel < 1:
        raise UserError(f"--parallel {arguments.parallel}: at least 1")
    _check_measures(arguments)
    planned = plan(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return _list(arguments, planned)
    if arguments.tensorboard is not None:
        from fedge_simulations.tensorboard import check_installed

        check_installed()
    manner = Manner(arguments.parallel, arguments.overwrite, arguments.tensorboard)
    if arguments.format == "json":
        outcomes = sweep(planned, arguments.out, manner, Heard())
    else:
        with watching(planned, manner) as heard:
            outcomes = sweep(planned, arguments.out, manner, heard)
    return _conclude(arguments, outcomes)


def _check_measures(arguments: argparse.Namespace) -> None:
    """Refuse before the runs what the comparison after them would refuse."""
    from fedge.config import Target

    try:
        if arguments.target is not None:
            Target.parse(arguments.target)
    except ValueError as error:
        raise UserError(f"--target {arguments.target!r}: {error}") from error


def _list(arguments: argparse.Namespace, planned: list[Planned]) -> int:
    if arguments.format == "json":
        say(json.dumps([{"name": run.name, "settings": dict(run.settings)} for run in planned], indent=2))
    else:
        for run in planned:
            say(run.name)
        say(f"{len(planned)} runs")
    return 0


def _conclude(arguments: argparse.Namespace, outcomes: list[Outcome]) -> int:
    """Compare what there is, tell what failed."""
    from fedge_simulations.compare import compare
    from fedge_simulations.compare_page import write_comparison

    comparison, fault = None, ""
    folders = [arguments.out / outcome.run.name for outcome in outcomes if outcome.ended != "failed"]
    page = arguments.out / "compare.html"
    try:
        if folders:
            comparison = compare(
                folders, metric=arguments.metric, target=arguments.target, within=arguments.out
            )
            write_comparison(page, comparison)
    except FedgeError as error:  # the runs are there all the same
        fault = f"no comparison: {error}"
    if arguments.format == "json":
        value = {"runs": [outcome.to_json() for outcome in outcomes]}
        say(json.dumps(value | {"comparison": comparison.to_json() if comparison else None}, indent=2))
    elif comparison is not None:
        say("")
        show_comparison(comparison)
        say(f"\nwritten: {page}")
    for line in [fault, *(f"{o.run.name}: {o.ended}: {o.reason}" for o in outcomes if o.reason)]:
        if line:
            print(f"fedge-sim: {line}", file=sys.stderr)  # noqa: T201
    return 1 if fault or any(outcome.reason for outcome in outcomes) else 0
