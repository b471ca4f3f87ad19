"""What `fedge-sim` prints: lines, tables, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_COLUMNS = 140  # in a pipe rich assumes 80 columns and would cut a table


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - this is the command's output


def silent(_: Any) -> None:
    """Print nothing."""


def add_format(parser: argparse.ArgumentParser, json_help: str) -> None:
    """Add --format."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help=f"json: {json_help}")


def show(summary: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a run's summary."""
    if arguments.format == "json":
        say(json.dumps(summary, indent=2))
        return
    tables(summary)
    say(f"\nwritten: {arguments.out}/report.html, summary.json, history.jsonl, model.safetensors")


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str]) -> None:
    """Print a table; columns named in `left` stand to the left, the others to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in heads:
        table.add_column(name, no_wrap=True, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table, in a pipe as wide as it is."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else max(_PIPE_COLUMNS, _width(table))
    Console(file=sys.stdout, width=wide, highlight=False).print(table)


def _width(table: Table) -> int:
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum


def tables(summary: dict[str, Any]) -> None:
    """Print what a summary holds."""
    model = summary["global_model"]
    auc = f", AUC {model['auc']:.4f}" if "auc" in model else ""
    say(
        f"\nglobal model: accuracy {model['accuracy']:.4f}{_between(model)}{auc} on held-out data, "
        f"{model['parameters']:,} parameters, {model['bytes']:,} bytes"
    )
    if variants := summary.get("variants"):
        _tier_table(variants, model["bytes"])
    for entry in summary.get("devices", []):
        same = "the same" if entry["same_as_gate"] else "OTHER"
        say(
            f"device {entry['id']}: release {entry['release']}, accuracy {entry['accuracy']:.4f}, "
            f"{same} answers as the gate scored"
        )
    if "accuracy_mean" in (own := summary.get("on_clients", {})):
        say(
            f"on {own['clients']:.0f} clients' own data: accuracy {own['accuracy_mean']:.4f} on average, "
            f"{own['accuracy_worst_decile']:.4f} on the worst tenth, {own['accuracy_min']:.4f} at least"
        )
    if "cross_validation" in summary:
        _cross_validation(summary["cross_validation"])


def _between(model: dict[str, Any]) -> str:
    found = model.get("intervals", {})
    if "accuracy" not in found:
        return ""
    low, high = found["accuracy"]
    return f" ({low:.4f} to {high:.4f} at {100 * found['confidence']:g} % over {found['over']})"


def _cross_validation(found: dict[str, Any]) -> None:
    for fold in found["folds"]:
        auc = f"AUC {fold['auc']:.3f}, " if "auc" in fold else ""
        who = f"client {', '.join(fold['clients'])}" if "clients" in fold else f"part {fold['fold']}"
        say(f"without {who}, tested on its {fold['examples']}: {auc}accuracy {fold['accuracy']:.3f}")
    accuracy = found["metrics"]["accuracy"]
    say(
        f"{len(found['folds'])} trainings without a part, tested on it: accuracy {accuracy['mean']:.4f}, "
        f"deviation {accuracy['std']:.4f}, {accuracy['low']:.4f} to {accuracy['high']:.4f} "
        f"at {100 * found['confidence']:g} %"
    )


def _tier_table(variants: list[dict[str, Any]], teacher_bytes: int) -> None:
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
    print_table(table)
    for variant in variants:
        if "wire_bytes" not in variant:
            say(f"tier {variant['tier']} gets no variant: {variant['gate'].removeprefix('failed: ')}")


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
