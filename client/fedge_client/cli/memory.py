"""`fedge-client memory`: labelled examples that this device keeps to learn from, by consent."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedge import cli
from fedge.errors import FedgeError, UserError
from fedge_client.cli.agent import add_home

if TYPE_CHECKING:
    from fedge.spec import Spec
    from fedge_client.memory.memory import Memory


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "labelled examples kept here to learn from: consent, add, show, forget, withdraw"
    group = commands.add_parser("memory", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    _add(
        inner, "consent", _consent, "Allow this device to keep examples; before that nothing is kept.",
        "  fedge-client memory consent",
    )  # fmt: skip
    made = _add(
        inner, "add", _add_examples, "Keep the examples of a file, which have this label.",
        "  fedge-client memory add picture.png --label seven",
    )  # fmt: skip
    made.add_argument("file", type=Path, help="as fedge-client infer takes it")
    made.add_argument("--label", required=True, metavar="LABEL", help="of the installed release's labels")
    made = _add(inner, "show", _show, "Show how much is kept, by label.", "  fedge-client memory show")
    made.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    made = _add(
        inner, "forget", _forget, "Forget examples; consent stays.",
        "  fedge-client memory forget\n  fedge-client memory forget --label seven --older-days 30",
    )  # fmt: skip
    made.add_argument("--label", metavar="LABEL", help="of this label alone")
    made.add_argument("--older-days", type=float, metavar="N", help="that came longer ago alone")
    _add(
        inner, "withdraw", _withdraw, "Withdraw consent: forget everything, and keep nothing more.",
        "  fedge-client memory withdraw",
    )  # fmt: skip


def _add(
    inner: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str
) -> argparse.ArgumentParser:
    made = cli.subcommand(inner, name, run, summary=summary, examples=examples)
    add_home(made)
    made.add_argument("--task", metavar="TASK", help="default: the installed release's")
    return made


def _consent(arguments: argparse.Namespace) -> int:
    with _memory(arguments) as (memory, _):
        memory.give_consent()
    return _say("from now on examples may be kept; fedge-client memory withdraw forgets them")


def _add_examples(arguments: argparse.Namespace) -> int:
    from fedge.fitting import fit
    from fedge_client.inputs import read_input

    with _memory(arguments) as (memory, spec):
        if not memory.consent:
            raise UserError("nothing is kept before there is consent; run: fedge-client memory consent")
        label = _label(spec, arguments.label)
        batch = fit(read_input(arguments.file, spec), spec)  # (B, *spec.shape)
        kept = [memory.add(np.asarray(example), label, time.time()) for example in batch]
    return _say(f"kept {sum(kept)} of {len(kept)} examples of {arguments.label!r}")


def _show(arguments: argparse.Namespace) -> int:
    with _memory(arguments) as (memory, spec):
        counts = np.bincount(memory.examples().y, minlength=spec.classes)
        shown: dict[str, Any] = {
            "consent": memory.consent,
            "examples": int(counts.sum()),
            "labels": {spec.labels[i]: int(counts[i]) for i in np.flatnonzero(counts)},
            "seen": {spec.labels[label]: count for label, count in memory.seen().items()},
        }
    if arguments.format == "json":
        return _say(json.dumps(shown))
    lines = [f"consent               {'yes' if shown['consent'] else 'no'}"]
    lines += [f"examples              {shown['examples']}"]
    lines += [
        f"{name:<21} {count} of {shown['seen'].get(name, count)}" for name, count in shown["labels"].items()
    ]
    return _say("\n".join(lines))


def _forget(arguments: argparse.Namespace) -> int:
    days = arguments.older_days
    if days is not None and not 0 <= days < 1e6:
        raise UserError(f"--older-days {days:g}: must be 0 or more")
    with _memory(arguments) as (memory, spec):
        label = None if arguments.label is None else _label(spec, arguments.label)
        count = memory.forget(label=label, before=None if days is None else time.time() - days * 86_400)
    return _say(f"forgot {count} examples")


def _withdraw(arguments: argparse.Namespace) -> int:
    from fedge_client.memory.memory import remove

    try:
        with _memory(arguments) as (memory, _):
            memory.withdraw_consent()
    except FedgeError:  # of another model, or damaged: it goes all the same
        remove(_folder(arguments, arguments.task or _release(arguments).task))
    return _say("nothing is kept any more, and what was is forgotten")


@contextmanager
def _memory(arguments: argparse.Namespace) -> Iterator[tuple[Memory, Spec]]:
    """The memory of the task that is meant, and the spec of its examples."""
    from fedge_client.agent import settings
    from fedge_client.memory.training import opened

    release = _release(arguments)
    task = arguments.task or release.task
    if task != release.task:
        raise UserError(f"--task {task!r}: the installed release is of task {release.task!r}")
    keeping = settings.load(arguments.home / settings.FILE).memory.keeping()
    with opened(_folder(arguments, task), release.spec, keeping) as memory:
        yield memory, release.spec


def _release(arguments: argparse.Namespace) -> Any:
    """The installed release, which says what an example and a label are."""
    from fedge_client.device import Device

    installed, _ = Device.open(arguments.home).running()
    return installed.release


def _folder(arguments: argparse.Namespace, task: str) -> Path:
    from fedge_client.agent.settings import MEMORY

    return Path(arguments.home).absolute() / MEMORY / task


def _label(spec: Spec, label: str) -> int:
    if label not in spec.labels:
        few = ", ".join(map(repr, spec.labels[:10]))
        raise UserError(f"--label {label[:60]!r}: is none of the release's: {few}")
    return spec.labels.index(label)


def _say(line: str) -> int:
    sys.stdout.write(line + "\n")
    return 0
