"""fedge as a contestant: a run's own rounds, from choosing clients to the commit, evaluation included.

`FEDGE.build` is the built-in network of the same shape, `_sim_work`'s class the user's own module, in which
there is nothing to recognise. Both begin at the same weights.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sim_work import BATCH, TEST, WORKS, Data, Turn, private_stdout, seeded, turns
from flwr.app import Array, Context, Message, MessageType
from torch import nn

from fedge.config import Config
from fedge.dataset import Dataset
from fedge.learning import models
from fedge.spec import Spec
from fedge.task import Source, Task
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.grid import ClientCall, VectorGrid
from fedge_simulations.simulate import learn
from fedge_simulations.world import World, prepare

NORM = 1e6
BUILT_IN, OWN = "built-in", "own"  # names of the two models


def _task(name: str, built_in: models.Builder) -> Task:
    chosen = WORKS[name]
    spec = Spec("image", (chosen.side, chosen.side), "float32", tuple("0123456789"))

    def read(source: Source) -> Dataset:
        """As many examples as the file's name says; there is no such file."""
        assert source.path is not None
        data = Data.made(chosen.side, int(source.path.name))
        test = np.arange(len(data.y)) >= len(data.y) - TEST
        return Dataset(spec, data.x, data.y, test=test)

    def of(build: Callable[[], nn.Module]) -> models.Builder:
        return lambda _: seeded(build)

    networks = {BUILT_IN: of(lambda: built_in(spec)), OWN: of(chosen.build)}
    return Task(name=name, read=read, models=networks, default_model=BUILT_IN, students={})


TINY = _task("tiny", models.mlp(32))
MLP = _task("mlp", models.mlp(200, 200))
CNN = _task("cnn", models.cnn)


def config(name: str, clients: int, changes: dict[str, Any], examples: int | None = None) -> Config:
    """A run without end of the workload, all its clients in each round, on one core if nothing else is said.

    Args:
        name: of the workload.
        clients: how many.
        changes: sections whose keys replace these, or are added.
        examples: of the data set; as many as the clients need if absent.
    """
    chosen = WORKS[name]
    sections: dict[str, Any] = {
        "clients": {"count": clients, "partition": "iid"},
        "rounds": {"count": 1_000_000},
        "model": {"name": BUILT_IN, "standardise": False},
        "train": {"batch_size": BATCH, "learning_rate": chosen.learning_rate, "momentum": 0.0},
        "evaluate": {"metrics": ["accuracy"], "proxy_fraction": 0.0},
        "simulation": {"workers": 1},
        "strategy": {"name": "fedavg"},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    data = str(examples if examples is not None else clients * chosen.samples)
    return Config.from_mapping({"task": f"_sim_fedge:{name.upper()}", "data": data, **sections})


class Modded(World):
    """The same clients, each with a mod around its app."""

    def grid(self, run_config: Any, **further: Any) -> VectorGrid:
        """A Grid whose clients really run their app."""
        return World.grid(self, run_config, around=_clipping, **further)


def _clipping(app: ClientCall) -> ClientCall:
    """A client mod as a user would write it: the change is cut to a norm, which none reaches here."""

    def clipped(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if reply.has_error() or message.metadata.message_type != MessageType.TRAIN:
            return reply
        (sent,), (record,) = message.content.array_records.values(), reply.content.array_records.values()
        start = {name: array.numpy() for name, array in sent.items()}
        changes = {name: array.numpy() - start[name] for name, array in record.items()}
        norm = math.sqrt(sum(float(np.vdot(change, change)) for change in changes.values()))
        if norm > NORM:
            for name, change in changes.items():
                record[name] = Array(start[name] + change * np.float32(NORM / norm))
        return reply

    return clipped


def _examples(world: World) -> float:
    """Mean of the clients' examples, over the first thousands."""
    some = range(min(len(world.clients), 5000))
    return float(np.mean([len(world.clients[i]) for i in some]))


def rounds(world: World, answers: Any) -> None:
    """Rounds of a run; a turn waits in the observer."""
    asked, each = turns(answers), _examples(world)
    turn = next(asked, None)

    def observe(record: RoundRecord) -> None:
        nonlocal turn
        assert turn is not None
        assert not record.failures, record
        examples = record.clients * each
        if turn.done(clients=record.clients, steps=np.ceil(each / BATCH) * record.clients, examples=examples):
            if turn.first:
                turn.found["loss"] = float(record.metrics["loss"])
            turn = next(asked, None)
        if turn is None:
            raise SystemExit

    if isinstance(turn, Turn):
        with tempfile.TemporaryDirectory() as home:
            learn(world, Path(home), "benchmark", observe)


def main(arguments: list[str]) -> None:
    """WORK CLIENTS CHANGES [EXAMPLES], the changes as JSON; with a key `mod` each client has a mod."""
    name, clients, changes, *further = arguments
    answers = private_stdout()
    asked_for = json.loads(changes)
    kind = Modded if asked_for.pop("mod", None) else World
    asked = config(name, int(clients), asked_for, *map(int, further))
    if asked.simulation.workers == 1:
        torch.set_num_threads(1)
    world = prepare(asked)
    rounds(kind(**{each.name: getattr(world, each.name) for each in fields(world)}), answers)


if __name__ == "__main__":
    main(sys.argv[1:])
