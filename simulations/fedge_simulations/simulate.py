"""A whole run on one machine: rounds, compression, release, devices, report."""

from __future__ import annotations

import gc
import importlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict

from fedge.config import Config
from fedge.errors import UserError
from fedge.files import is_held, sole_holder
from fedge.learning.whole import WholeModel
from fedge_server import app as server_app
from fedge_server.compression import TierOutcome
from fedge_server.compression.clients import Fleet
from fedge_server.compression.gate import score
from fedge_server.pipeline import (
    HISTORY,
    MODEL,
    PRIVACY,
    REPORT,
    SUMMARY,
    Place,
    Say,
    conclude,
    observer,
    release,
)
from fedge_server.plots import Holdings
from fedge_server.registry.database import Registry
from fedge_server.release import KEYS, REPOSITORY
from fedge_server.rounds.loop import Learned, Observer
from fedge_server.rounds.record import Metric, RoundRecord
from fedge_server.rounds.scoring import probabilities_of
from fedge_server.rounds.starting import check_start
from fedge_server.rounds.stopping import why_stop
from fedge_simulations import ray
from fedge_simulations.devices import DEVICES, DeviceHome, DeviceResult, deliver
from fedge_simulations.engine.measured import PLAN
from fedge_simulations.folds import FOLDS, cross_validate
from fedge_simulations.grid import RUN_ID, SERVER_NODE, VectorGrid
from fedge_simulations.runs import LOCK, committed, run_id_of
from fedge_simulations.scenario import EVENTS
from fedge_simulations.scenario.backdoor import brightest, target_of, triggered
from fedge_simulations.states import FOLDER
from fedge_simulations.world import World, prepare

FLEET = "students"  # in a run folder: the rounds in which clients train these, and what else they are asked
_OCCUPIED = "{}: another process runs in it; wait for it, or choose another --out"


@dataclass(frozen=True, slots=True)
class Result:
    """What a simulation gave; `folder` holds the files when one was named."""

    summary: dict[str, Any]  # as in summary.json
    learned: Learned  # the global model and its rounds
    outcomes: tuple[TierOutcome, ...]  # one per tier
    devices: tuple[DeviceResult, ...]  # one per published variant
    folder: Path | None

    @property
    def accuracy(self) -> float:
        """Of the global model after the last round, on the server's test data; a fraction of 1."""
        return float(self.summary["global_model"]["accuracy"])

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Everything that was measured of the global model after the last round."""
        return self.history[-1].metrics

    @property
    def history(self) -> tuple[RoundRecord, ...]:
        """One record per round, from round 1."""
        return self.learned.records

    @property
    def model(self) -> WholeModel:
        """The global model with its pre-processing: a torch module from raw examples to logits."""
        return self.learned.model

    @property
    def complete(self) -> bool:
        """Whether every tier got a variant and every device answered as the gate scored."""
        return all(o.variant for o in self.outcomes) and all(d.same_as_gate for d in self.devices)


def run(
    config: Config | Mapping[str, Any],
    out: Path | None = None,
    *,
    overwrite: bool = False,
    say: Say = lambda _: None,
    observe: Observer = lambda _: None,
) -> Result:
    """Simulate a configuration from data to answering devices.

    Args:
        config: the whole run; also as a nested mapping of its keys, such as `{"rounds": {"count": 5}}`.
        out: run folder; an interrupted run of the same configuration in it is resumed. None: nothing is kept.
        overwrite: replace an earlier run in that folder.
        say: hears of each stage.
        observe: hears of each committed round.

    Raises:
        UserError: configuration, data or folder cannot be used; nothing has been written then.
        FedgeError: the work failed.
    """
    started = time.perf_counter()
    config = config if isinstance(config, Config) else Config.from_mapping(config)
    if config.simulation.engine == "ray":
        ray.check(config)
    world = prepare(config)
    began = out is not None and committed(out, config) > 0
    if not began:
        check_start(config, world.task, world.server, None)
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedge-")))
        resumed = _claim(folder, config, overwrite=overwrite)
        stack.enter_context(_alone(folder))
        registry = stack.enter_context(Registry.open(folder))
        if resumed:
            say(_resuming(folder, config, registry.records(run_id_of(config))))
        say(_describe(world))
        place = Place(
            run_id=run_id_of(config),
            folder=folder,
            home=folder,
            registry=registry,
            config=config,
            task=world.task,
            server=world.server,
            say=say,
            started=started,
            fleet=fleet_of(world, folder),
            page=out is not None,
        )
        learned = learn(world, folder, place.run_id, observer(place, observe))
        outcomes, released = release(place, learned)
        devices = _deliver(folder, outcomes, world) if released else ()
        validated = cross_validate(world, folder / FOLDS, learn, say)
        summary = conclude(
            place,
            learned,
            outcomes,
            clients=len(world.clients),
            holdings=Holdings(world.dataset, world.clients, world.names),
            further={
                "cross_validation": validated,
                "devices": [device.to_json() for device in devices],
                "backdoors": backdoors(world, learned.model),
            },
        )
        return Result(summary, learned, outcomes, devices, out)


def learn(world: World, home: Path, run_id: str, observe: Observer) -> Learned:
    """Run the ServerApp over the world's Grid and hand back what it learned."""
    results: list[Learned] = []
    app = server_app.build(lambda *_: world.server, observe, results.append)
    settings = server_app.run_config(world.config, home, run_id)
    if world.config.simulation.engine == "ray":
        ray.run(app, world, settings)
    else:
        with _little_to_collect(), closing(world.grid(settings)) as grid:
            app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
    return results[0]


def fleet_of(world: World, folder: Path) -> Fleet:
    """The world's clients for what follows their rounds: as they are then, on a clock that begins anew.

    Of any engine they answer in this process: of "ray" and "sequential" alike one by one.
    """

    def over(home: Path) -> AbstractContextManager[VectorGrid]:
        return closing(world.grid(server_app.run_config(world.config, home, FLEET)))

    return Fleet(over, folder / FLEET)


@contextmanager
def _little_to_collect() -> Iterator[None]:
    """Leave out of garbage collection what was there before.

    A message is dozens of objects that refer to one another, so thousands of them in each round let Python
    look through everything in memory again and again, which are libraries for the most part.
    """
    importlib.import_module("torch._dynamo")  # a fifth of all that; torch's optimisers load it at first use
    gc.collect(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _deliver(folder: Path, outcomes: tuple[TierOutcome, ...], world: World) -> tuple[DeviceResult, ...]:
    """One device for each tier that has a variant."""
    made, data = [o.variant for o in outcomes if o.variant is not None], world.server
    scored = {
        each.tier: each.probabilities
        if each.probabilities is not None  # else clients have counted; the server's data show the device
        else score(each.wire, len(each.installed), data.spec, data.gate.x)
        for each in made
    }
    homes = [DeviceHome(f"{tier}-1", tier, folder / DEVICES / f"{tier}-1") for tier in scored]
    return deliver(folder / REPOSITORY, homes, scored, data.gate, data.spec.labels)


def backdoors(world: World, model: WholeModel) -> list[dict[str, Any]]:
    """Of test images that are not of a backdoor's class: the share that its pixel leads there."""
    course, found = world.course(None), []
    for target in sorted(t for kind in course.kinds if (t := target_of(kind)) is not None):
        others = world.server.test.take(np.flatnonzero(world.server.test.y != target))
        shown = replace(others, x=triggered(others.x, brightest(world.dataset.x)))
        success, without = (
            float((probabilities_of(model, images).argmax(1) == target).mean()) for images in (shown, others)
        )
        found.append({"class": target, "success": success, "without_trigger": without})
    return found


def _claim(folder: Path, config: Config, *, overwrite: bool) -> bool:
    """Whether the folder holds an interrupted run of this very configuration.

    Raises:
        UserError: it holds something else.
    """
    if not folder.exists() or not any(path.name != LOCK for path in folder.iterdir()):
        return False
    if is_held(folder / LOCK):
        raise UserError(_OCCUPIED.format(folder))
    is_run = (folder / "fedge.db").exists()
    if is_run and overwrite:
        _remove_run(folder)
        return False
    if not is_run:
        raise UserError(f"{folder} is not empty and holds no run of fedge; choose another --out")
    if (folder / SUMMARY).exists():
        raise UserError(f"{folder} holds a finished run; choose another --out, or --overwrite it")
    with Registry.open(folder) as registry:
        known = [run["id"] for run in registry.runs()]
    if known and run_id_of(config) not in known:
        raise UserError(
            f"{folder} holds an interrupted run of another configuration; choose another --out, "
            "or --overwrite it"
        )
    return True


def _remove_run(folder: Path) -> None:
    """Delete what a run writes, and nothing that somebody else put beside it."""
    for name in (SUMMARY, HISTORY, MODEL, REPORT, PRIVACY, EVENTS, PLAN):
        (folder / name).unlink(missing_ok=True)
    for name in ("store", REPOSITORY, KEYS, DEVICES, FOLDER, FOLDS, FLEET):
        shutil.rmtree(folder / name, ignore_errors=True)
    for database in folder.glob("fedge.db*"):
        database.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep every other process out of a run folder until the end.

    Raises:
        UserError: one is there already, or the folder cannot be made.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_holder(folder / LOCK))
        except BlockingIOError as error:
            raise UserError(_OCCUPIED.format(folder)) from error
        except OSError as error:
            raise UserError(f"{folder}: cannot be made or written ({error.strerror})") from error
        yield


def _resuming(folder: Path, config: Config, records: Sequence[RoundRecord]) -> str:
    """Say from where an interrupted run goes on."""
    last = records[-1].round if records else 0
    done = {0: "no round is", 1: "round 1 is"}.get(last, f"rounds 1 to {last} are")
    over = why_stop(records, config.rounds) is not None
    onward = "going on with what follows the rounds" if over else f"going on with round {last + 1}"
    return f"resuming the interrupted run in {folder}: {done} committed, {onward}"


def _describe(world: World) -> str:
    server = world.server
    return (
        f"task {world.config.task}: {world.clients.describe()}, {world.config.clients.partition}); "
        f"server: {len(server.proxy)} proxy, "
        f"{len(server.test)} test, {len(server.gate)} gate"
    )
