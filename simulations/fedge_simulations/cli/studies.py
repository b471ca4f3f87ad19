"""`fedge-sim compare` and `fedge-sim sweep`: several runs together."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge_simulations.cli.output import add_format, plain_table, say

if TYPE_CHECKING:
    from fedge_simulations.compare import Comparison

_COMPARE_EXAMPLES = """\
  fedge-sim compare out/fedavg-seed0 out/fedavg-seed1 out/fedprox-seed0 out/fedprox-seed1 --out compare.html
  fedge-sim compare out/sweep --target "accuracy>=0.95" --format json"""
EXAMPLES = _COMPARE_EXAMPLES.splitlines()[0]


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
