"""`fedge-server compress`: the best variants of a run's global model, or of any model file, for tiers."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import ConfigError, UserError
from fedge_server.cli.place import show
from fedge_server.cli.runs import find_run, open_registry

if TYPE_CHECKING:
    from fedge_server.compression import TierOutcome


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "compress",
        _compress,
        summary="make and gate variants of a run's global model, and publish them; or of a model file",
        examples="  fedge-server compress --home out/digits --tiers tiers.toml\n"
        "  fedge-server compress teacher.safetensors --tiers images.toml --out small\n\n"
        "  tiers.toml holds tables such as:  [micro]\n"
        "                                    max_wire_bytes = 6_000\n"
        "                                    max_drop = 0.03",
    )
    made.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model file or release:N (default: a run's global model)"
    )
    made.add_argument(
        "--tiers", type=Path, metavar="FILE",
        help="tiers to serve (default: the run's own); for a MODEL a whole configuration",
    )  # fmt: skip
    made.add_argument("--run", metavar="ID", dest="run_id", help="which run (default: the newest)")
    made.add_argument("--out", type=Path, metavar="DIR", help="where a MODEL's variants and report go")
    made.add_argument("--home", type=Path, metavar="DIR", help="home or run folder (default: FEDGE_HOME)")
    made.add_argument("--format", choices=("text", "json"), default="text")


def _compress(arguments: argparse.Namespace) -> int:
    return _of_run(arguments) if arguments.model is None else _of_model(arguments)


def _of_run(arguments: argparse.Namespace) -> int:
    """Variants that are published, with a lineage."""
    from fedge.config import Config
    from fedge.task import resolve
    from fedge_server.compression import check_possible
    from fedge_server.data import data_of_run
    from fedge_server.pipeline import Place, publish
    from fedge_server.release import REPOSITORY
    from fedge_server.rounds.loop import recall

    opened, registry = open_registry(arguments.home)
    home = opened.root
    with registry:
        run = find_run(registry, arguments.run_id)
        config = Config.from_mapping(run["config"])
        if arguments.tiers is not None:
            config = replace(config, tiers=Config.from_mapping({"tiers": _read_tiers(arguments.tiers)}).tiers)
        if not config.tiers:
            raise ConfigError("the run names no tiers; give them with --tiers FILE")
        task = resolve(config.task)
        data = data_of_run(config, task, run["data"])
        if data is None:
            raise UserError(
                f"run {run['id']}: the data in {config.data or config.task} has changed since the run; "
                "its gate could hold examples that were trained on"
            )
        check_possible(task, data.spec, config, data.proxy.x, gate=data.gate)
        learned = recall(registry, run["id"], config, task, data.spec)
        say = _silent if arguments.format == "json" else _say
        place = Place(run["id"], opened.run(run["id"]), home, registry, config, task, data, say)
        outcomes, published = publish(place, learned)
    value = {
        "release": published.release.version if published and published.release else None,
        "draft": published.draft if published and published.waiting else None,
        "tiers": {outcome.tier: outcome.reason for outcome in outcomes},
    }
    lines = published.lines(home / REPOSITORY) if published else ["nothing published"]
    show(arguments, value, lines)
    return 0 if all(outcome.variant for outcome in outcomes) else 1


def _of_model(arguments: argparse.Namespace) -> int:
    """Variants that are written into a folder: nobody knows the rounds that a file comes from."""
    from fedge.config import Config
    from fedge.task import resolve
    from fedge_server.compression import check_possible, compress
    from fedge_server.compression.choose import source_of
    from fedge_server.data import own_data
    from fedge_server.pipeline import CANDIDATES
    from fedge_server.rounds.starting import whole_model

    if arguments.tiers is None or arguments.out is None:
        raise UserError(
            "for a MODEL, give --out DIR and --tiers FILE, a configuration with task, data and tiers"
        )
    config = Config.load(arguments.tiers)
    if not config.tiers:
        raise ConfigError(f"{arguments.tiers} names no tiers; add a table such as [tiers.micro]")
    task = resolve(config.task)
    data = own_data(config, task)
    registry = open_registry(arguments.home)[1] if arguments.model.startswith("release:") else None
    model, _ = whole_model(arguments.model, config, task, data.spec, registry)
    check_possible(task, data.spec, config, data.proxy.x, gate=data.gate)
    say = _silent if arguments.format == "json" else _say
    source = source_of(config, task, data, model)
    say(f"compress: {source.describe()}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = compress(model, task, data.spec, source, config, say, folder=arguments.out / CANDIDATES)
    value = _written(arguments.out, arguments.model, model.network, source.describe(), outcomes)
    show(arguments, value, [f"written: {arguments.out / 'report.html'}"])
    return 0 if all(outcome.variant for outcome in outcomes) else 1


def _written(
    folder: Path, name: str, network: Any, source: str, outcomes: Sequence[TierOutcome]
) -> dict[str, Any]:
    """Each variant as installed and as it travels, its evidence, the report, and last of all the summary."""
    from fedge.files import sha256, write_atomically
    from fedge_server import plots
    from fedge_server.page import write_page
    from fedge_server.summary import fp32_bytes, tier_row

    for variant in (outcome.variant for outcome in outcomes if outcome.variant is not None):
        write_atomically(folder / f"{variant.tier}.onnx", variant.installed)
        write_atomically(folder / f"{variant.tier}.wire", variant.wire)
        gate = json.dumps(variant.gate.to_json(), indent=2)
        write_atomically(folder / f"{variant.tier}.gate.json", gate.encode())
    rows, size = [tier_row(outcome) for outcome in outcomes], fp32_bytes(network)
    known = any(trial.accuracy is not None for outcome in outcomes for trial in outcome.tried)
    drawn = [plots.candidates(outcomes, size)] if known else []
    write_page(
        folder / "report.html",
        "fedge_server",
        "compression.html.j2",
        model=name,
        source=source,
        teacher_bytes=size,
        variants=rows,
        outcomes=outcomes,
        plots=drawn,
    )
    digests = {o.tier: sha256(o.variant.wire) for o in outcomes if o.variant is not None}
    value = {"model": name, "bytes": size, "source": source, "variants": rows, "sha256": digests}
    write_atomically(folder / "summary.json", json.dumps(value, indent=2).encode())
    return value


def _read_tiers(path: Path) -> dict[str, Any]:
    """Tables of tiers, or a whole configuration's `[tiers.*]`."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"tiers {path}: cannot be read ({error})") from error
    tiers: dict[str, Any] = values.get("tiers", values)
    return tiers


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _silent(_: str) -> None:
    pass
