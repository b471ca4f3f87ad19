"""The round loop over Flower's Strategy seam: what `Strategy.start` does, with commit and resume.

The six steps of distributed training, and where each stands: data is **partitioned** before (every client
holds its own); `_initialise` **initialises** the global model; a client's local step
(`fedge.learning.local`) does **forward and backward**; `strategy.aggregate_train` **aggregates** and
**updates the global model**; `learn` **repeats** until `stopping` says why not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flwr.serverapp import Grid
from torch import nn

from fedge.config import Config
from fedge.errors import BudgetError, FedgeError, HubAwayError, RoundError, SupersededError
from fedge.learning import local
from fedge.learning.messages import Instructions
from fedge.learning.state import arrays_of, load_arrays, names_of
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import Task
from fedge.task_digest import task_digest
from fedge_server import strategies
from fedge_server.data import ServerData
from fedge_server.privacy.protection import Protection
from fedge_server.privacy.rules import check_model
from fedge_server.registry.database import CommittedRound, Registry
from fedge_server.registry.ledger import Ledger
from fedge_server.rounds.asynchronous import UnderWay
from fedge_server.rounds.choosing import Choice
from fedge_server.rounds.downlink import Downlink
from fedge_server.rounds.frozen import Frozen
from fedge_server.rounds.grids import Simulated, nodes_of
from fedge_server.rounds.moments import federated_moments, kept_moments
from fedge_server.rounds.pace import Pace
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.remembering import remembering
from fedge_server.rounds.run import Run
from fedge_server.rounds.sampling import cohort_size
from fedge_server.rounds.secure import encoding_of
from fedge_server.rounds.starting import Start, about, start_of
from fedge_server.rounds.stopping import check_target, why_not_counted, why_stop
from fedge_server.rounds.teaching import Teaching
from fedge_server.strategies.asynchronous import Asynchronous
from fedge_server.strategies.state import beside_of, restore

Observer = Callable[[RoundRecord], None]
"""Told of each round once it is committed; on resume, of the earlier ones first."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The result of a run's rounds."""

    model: WholeModel  # with the weights of the last committed round
    model_sha256: str  # of those weights in the store
    records: tuple[RoundRecord, ...]  # rounds 1 .. last
    reason: str  # why it stopped
    origin: Mapping[str, Any] = field(default_factory=dict)  # what it began with, besides its seed


def learn(
    grid: Grid,
    config: Config,
    task: Task,
    data: ServerData,
    registry: Registry,
    run_id: str,
    observe: Observer,
    teaching: Teaching | None = None,
) -> Learned:
    """Run rounds from the last committed one until target, patience or count ends them.

    The run is left running in the registry: what follows its rounds is part of it. With `teaching` its model
    is a student, which clients train to answer as the teacher does (`rounds.teaching`).

    Raises:
        ConfigError: the strategy, model or pre-processing is not as configured.
        RoundError: no client answered, or several rounds in a row had too few valid updates.
    """
    check_target(config.rounds, config.evaluate.metrics, data.spec.classes)
    registry.begin_run(
        run_id, task=config.task, seed=config.seed, config=config.to_mapping(), data=data.digest()
    )
    try:
        run = _prepare(grid, config, task, data, registry, run_id, teaching)
        for record in run.records[1:]:
            observe(record)
        reason = _rounds(run, observe)
        if not any(record.counted for record in run.records[1:]):
            raise RoundError(f"no round counted: {why_not_counted(run.records[-1])}")
    except (SupersededError, HubAwayError):
        raise  # the run goes on elsewhere, or when the hub is back
    except FedgeError as error:
        registry.end_run(run_id, "failed", str(error))
        raise
    run.load_global()
    return Learned(run.model, run.model_sha256, tuple(run.records[1:]), reason, run.records[0].origin)


def _rounds(run: Run, observe: Observer) -> str:
    """Do rounds as long as there is no reason to stop, and return it."""
    while (reason := why_stop(run.records, run.config.rounds)) is None:
        try:
            record = run.next_round()
        except BudgetError as error:
            if not any(record.counted for record in run.records[1:]):
                raise
            return str(error)
        observe(record)
    return reason


def _prepare(
    grid: Grid,
    config: Config,
    task: Task,
    data: ServerData,
    registry: Registry,
    run_id: str,
    teaching: Teaching | None,
) -> Run:
    """Go on from the last committed round, or ask for moments and commit the initial model as round 0."""
    network = copy.deepcopy(_initialise(task, config, data) if teaching is None else teaching.student)
    check_model(config, network)
    if config.privacy.secure_aggregation:
        encoding_of(config, cohort_size(len(nodes_of(grid)), config.rounds))
    keep = not isinstance(grid, Simulated)  # simulated clients share the server's memory
    lessons = teaching or remembering(config, task, data, registry, run_id, network=network, keep=keep)
    lesson = None if lessons is None else lessons.lesson
    chosen = strategies.build(
        config, network=network, population=len(nodes_of(grid)), task=task, data=data, lesson=lesson
    )
    protection = Protection.of(
        config,
        Ledger(registry.engine, config.privacy.ledger),
        run_id,
        population=len(nodes_of(grid)),
        simulated=isinstance(grid, Simulated),
        records=registry.records(run_id),
    )
    ask = _instructions(config, task, data, chosen, protection)
    last = registry.last_round(run_id)
    if isinstance(grid, Simulated):
        grid.elapsed_s = 0.0 if last is None else last.record.simulated_s or 0.0
        grid.begin_round(0 if last is None else last.record.round + 1)
    if last is None:
        if teaching is None:
            start = start_of(config, task, data, registry, network)
        else:
            start = Start(arrays_of(network), asks_moments=False, moments=teaching.teacher.moments)
        moments = federated_moments(grid, ask, config) if start.asks_moments else start.moments
        arrays = start.arrays
    else:
        moments = kept_moments(last.model)
        arrays = {name: last.model[name] for name in names_of(network)}
        restore(chosen.strategy, last.state)
    model = WholeModel(task.preprocess(data.spec, moments, config.model.filter), network)
    told = replace(ask, moments=moments)
    run = Run(
        grid, config, data, registry, run_id, told, model, chosen, protection, arrays, "", [],
        about(config, task, data.spec),
    )  # fmt: skip
    _equip(run, lessons)
    if last is None:
        scores, _ = run.evaluate_centrally()
        run.commit(RoundRecord(0, scores, simulated_s=run.simulated_s(), origin=start.origin))
    else:
        _take_up(run, last)
    return run


def _equip(run: Run, teaching: Teaching | None) -> None:
    """Give a run the parts that its configuration asks for."""
    config, told, strategy = run.config, run.instructions, run.chosen.strategy
    if told.downlink is not None:
        run.downlink = Downlink(told.downlink, local.parameters_of(run.model.network), config.seed)
    if isinstance(strategy, Asynchronous):
        run.under_way = UnderWay.of(run.grid, config, strategy)
    run.pace, run.choice, run.teaching = Pace.of(config), Choice.of(config), teaching
    run.frozen = Frozen.of(run.chosen.terms, run.arrays, config)


def _take_up(run: Run, last: CommittedRound) -> None:
    """Go on from a committed round: its records, and what the run's parts remember."""
    run.records = run.registry.records(run.run_id)
    beside = beside_of(last.state)
    run.downlink = None if run.downlink is None else run.downlink.remembering(beside)
    run.pace = None if run.pace is None else run.pace.remembering(beside)
    run.choice = None if run.choice is None else run.choice.remembering(beside)
    run.frozen = None if run.frozen is None else run.frozen.remembering(beside)
    run.model_sha256 = last.model_sha256


def _instructions(
    config: Config,
    task: Task,
    data: ServerData,
    chosen: strategies.Chosen,
    protection: Protection | None,
) -> Instructions:
    """What clients are told, but for the moments that they are still to be asked for."""
    return Instructions(
        task=config.task,
        spec=data.spec,
        model=config.model.name or task.default_model,
        noise_filter=config.model.filter,
        moments=None,
        train=config.train,
        seed=config.seed,
        update=chosen.update,
        task_digest=task_digest(config.task),
        guard=None if protection is None else protection.guard,
        holdout=config.evaluate.client_holdout,
        terms=chosen.terms,
        codec=config.communication.uplink,
        downlink=config.communication.down,
    )


def recall(registry: Registry, run_id: str, config: Config, task: Task, spec: Spec) -> Learned:
    """What an earlier run learned, from its last committed round.

    Raises:
        RoundError: it has none.
    """
    last = registry.last_round(run_id)
    if last is None or last.record.round == 0:
        raise RoundError(f"run {run_id}: has no committed round yet")
    network = task.model(config.model.name)(spec)
    load_arrays(network, {name: last.model[name] for name in names_of(network)})
    preprocess = task.preprocess(spec, kept_moments(last.model), config.model.filter)
    first, *records = registry.records(run_id)
    whole = WholeModel(preprocess, network)
    return Learned(whole, last.model_sha256, tuple(records), "recalled", first.origin)


def _initialise(task: Task, config: Config, data: ServerData) -> nn.Module:
    """The global model's first weights, decided by the seed alone."""
    return local.first(task, config.model.name, data.spec, config.seed)
