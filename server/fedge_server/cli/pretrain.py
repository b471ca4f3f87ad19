"""`fedge-server pretrain`: train the global model on the server's own data before any device takes part."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import show

if TYPE_CHECKING:
    from fedge_server.data import ServerData

MAX_PROCESSES: Final = 1024


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "pretrain",
        _pretrain,
        summary="train the global model on the server's own data, with several processes",
        examples="  fedge-server pretrain digits.toml --out out/teacher\n"
        "  fedge-server pretrain images.toml --set rounds.count=30 --processes 4 --out out/teacher",
    )
    made.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to learn")
    made.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="run folder; resumed if interrupted"
    )
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    made.add_argument("--processes", type=int, default=1, metavar="N", help="share each batch among so many")
    made.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU for each process, if any",
    )
    made.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
    made.add_argument("--format", choices=("text", "json"), default="text")


def _pretrain(arguments: argparse.Namespace) -> int:
    from fedge.config import Config
    from fedge_server.pretraining.launching import launch
    from fedge_server.pretraining.preparing import SUMMARY, prepared
    from fedge_server.rounds.starting import describe

    processes, folder = arguments.processes, arguments.out
    if not 1 <= processes <= MAX_PROCESSES:
        raise UserError(f"--processes {processes}: must be from 1 to {MAX_PROCESSES}")
    device = _device(arguments.device, processes)
    config = Config.load(arguments.config, arguments.set)
    quiet = arguments.format == "json"
    with prepared(config, folder, processes, overwrite=arguments.overwrite) as run:
        if not quiet:
            records = run.registry.records(run.run_id)
            lines = [
                _about(config.task, run.data) + f"; {processes} x {device}",
                describe(records[0].origin),
                f"going on after round {records[-1].round}" if records[-1].round else "",
            ]
            _say(*filter(None, lines))
        launch(run, processes, device, quiet=quiet)
    summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    model = summary["global_model"]
    lines = [
        f"stopped: {summary['stopped']}",
        f"global model: accuracy {model['accuracy']:.4f} on test data, {model['parameters']:,} parameters",
        f"written: {folder}/model.safetensors, history.jsonl, summary.json",
    ]
    return show(arguments, summary, lines)


def _about(task: str, data: ServerData) -> str:
    """What there is to learn from."""
    sizes = f"{len(data.proxy):,} examples to train on, {len(data.test):,} test, {len(data.gate):,} gate"
    return f"task {task}: {sizes}"


def _device(asked: str, processes: int) -> str:
    """Where each process computes.

    Raises:
        UserError: there are too few GPUs.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and gpus < processes:
        raise UserError(f"--device cuda: {processes} processes need a GPU each, and here are {gpus}")
    return "cuda" if asked != "cpu" and gpus >= processes else "cpu"


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
