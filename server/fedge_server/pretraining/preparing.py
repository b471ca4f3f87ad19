"""A run without clients: its folder, its registry, and round 0, before any process is started.

It lies in a registry as every run does, so that what commits, resumes, compares, compresses and shows runs
does the same here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge.config import Config
from fedge.errors import UserError
from fedge.files import is_held, sha256, sole_holder
from fedge.learning import local
from fedge.learning.freezing import entries
from fedge.learning.state import load_arrays
from fedge.learning.whole import WholeModel
from fedge.statistics import Moments
from fedge.task import Task, resolve
from fedge_server.data import ServerData, own_data
from fedge_server.pretraining.sharing import check_shares
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import DATABASE
from fedge_server.rounds.moments import moments_arrays
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.scoring import probabilities_of, score
from fedge_server.rounds.starting import MODEL_FILE, about, start_of
from fedge_server.rounds.stopping import check_target

LOCK: Final = "run.lock"  # held in the folder as long as somebody trains there
SUMMARY, HISTORY = "summary.json", "history.jsonl"
_CHUNK: Final = 4096  # examples whose moments are computed at a time


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is checked, and where it is committed."""

    run_id: str
    folder: Path
    config: Config
    task: Task
    data: ServerData
    registry: Registry


@contextmanager
def prepared(config: Config, folder: Path, processes: int, *, overwrite: bool) -> Iterator[Prepared]:
    """A run of this configuration, with round 0 or more committed; nobody else is in the folder meanwhile.

    Raises:
        UserError: configuration, data or folder cannot be used; nothing has been written then.
    """
    task = resolve(config.task)
    data = own_data(config, task)
    check_target(config.rounds, config.evaluate.metrics, data.spec.classes)
    network = copy.deepcopy(local.first(task, config.model.name, data.spec, config.seed))
    entries(network, config.train.freeze)
    check_shares(network, len(data.proxy), config.train, processes)
    run_id = f"pretrain-{sha256(json.dumps(config.to_mapping(), sort_keys=True).encode())[:12]}"
    with ExitStack() as stack:
        _claim(folder, overwrite=overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_holder(folder / LOCK))
        except BlockingIOError as error:
            raise UserError(_OCCUPIED.format(folder)) from error
        except OSError as error:
            raise UserError(f"{folder}: cannot be made or written ({error.strerror})") from error
        registry = stack.enter_context(Registry.open(folder))
        if any(run["id"] != run_id for run in registry.runs()):
            raise UserError(
                f"{folder} holds an interrupted run of another configuration; choose another --out, "
                "or --overwrite it"
            )
        found = Prepared(run_id, folder, config, task, data, registry)
        _begin(found)
        yield found


_OCCUPIED: Final = "{}: somebody is training there now; wait for it, or choose another --out"


def _claim(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    if is_held(folder / LOCK):
        raise UserError(_OCCUPIED.format(folder))
    if not (folder / DATABASE).exists():
        raise UserError(f"{folder} is not empty and holds no run of fedge; choose another --out")
    if overwrite:
        for name in (SUMMARY, HISTORY, MODEL_FILE):
            (folder / name).unlink(missing_ok=True)
        for database in folder.glob(f"{DATABASE}*"):
            database.unlink()
    elif (folder / SUMMARY).exists():
        raise UserError(f"{folder} holds a finished run; choose another --out, or --overwrite it")


def _begin(found: Prepared) -> None:
    """Write the run down and commit round 0, unless that has been done."""
    config, data, registry = found.config, found.data, found.registry
    digest = data.digest()
    known = registry.run(found.run_id)
    if known is None or registry.last_round(found.run_id) is None:
        network = copy.deepcopy(local.first(found.task, config.model.name, data.spec, config.seed))
        start = start_of(config, found.task, data, None, network)
        moments = moments_of(data) if start.asks_moments else start.moments
        load_arrays(network, start.arrays)
        whole = WholeModel(found.task.preprocess(data.spec, moments, config.model.filter), network)
        scores = score(probabilities_of(whole, data.test), data, config)
        _write_down(found, digest)
        registry.commit_round(
            found.run_id,
            RoundRecord(0, scores, origin=start.origin),
            {**start.arrays, **moments_arrays(moments)},
            b"",
            about(config, found.task, data.spec),
        )
    else:
        _write_down(found, digest)


def _write_down(found: Prepared, digest: str) -> None:
    config = found.config
    found.registry.begin_run(
        found.run_id, task=config.task, seed=config.seed, config=config.to_mapping(), data=digest
    )


def moments_of(data: ServerData) -> Moments:
    """Moments of what is trained on, some examples at a time."""
    x = data.proxy.x
    return Moments.sum(Moments.of(x[i : i + _CHUNK], data.spec) for i in range(0, len(x), _CHUNK))
