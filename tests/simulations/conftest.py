"""Small worlds for tests: scikit-learn's digits, few clients, one linear layer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedge.config import Config
from fedge.dataset import Examples
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.learning.state import arrays_of
from fedge_server import app as server_app
from fedge_server.rounds.loop import Learned
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.grid import RUN_ID, SERVER_NODE, ClientCall
from fedge_simulations.trainers import Client, Trainers
from fedge_simulations.world import prepare

Tamper = Callable[[Message, Message], Message]
"""Replace a client's reply: (what it was sent, what it would answer) to what it answers."""


class Interrupted(Exception):  # noqa: N818 - stands for a power cut
    """The server died here."""


@pytest.fixture(autouse=True)
def quick_databases(quick_sqlite: None) -> None:
    """No test of this folder is about making a database."""


@pytest.fixture
def small() -> Callable[..., Config]:
    """A configuration of digits, 5 clients and a linear model, with further sections on top."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "model": {"name": "logistic"},
            "clients": {"count": 5},
            "rounds": {"count": 3},
            "train": {"epochs": 1, "batch_size": 32, "learning_rate": 0.05},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return Config.from_mapping(values)

    return make


@pytest.fixture
def learn() -> Callable[..., Learned]:
    """Run a configuration's rounds in a home folder; `stop_after` interrupts it.

    `tamper` corrupts replies; `around` wraps clients, such as a mod; `trainers` does their jobs.
    """

    def go(
        config: Config,
        home: Path,
        *,
        stop_after: int | None = None,
        tamper: dict[int, Tamper] | None = None,
        around: Callable[[ClientCall], ClientCall] | None = None,
        trainers: Trainers | None = None,
    ) -> Learned:
        def observe(record: RoundRecord) -> None:
            if record.round == stop_after:
                raise Interrupted

        gc.freeze()  # Flower's QFedAvg and Bulyan call gc.collect for every array record
        world = prepare(config)
        results: list[Learned] = []
        app = server_app.build(lambda *_: world.server, observe, results.append)
        settings = server_app.run_config(config, home, "test")
        grid = world.grid(settings, around=tampering(tamper) if tamper else around, trainers=trainers)
        app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
        return results[0]

    return go


def tampering(tamper: dict[int, Tamper]) -> Callable[[ClientCall], ClientCall]:
    """Around a ClientApp: some nodes answer as `tamper` says."""

    def around(honest: ClientCall) -> ClientCall:
        def call(message: Message, context: Context) -> Message:
            reply, change = honest(message, context), tamper.get(context.node_id)
            trained = message.metadata.message_type == "train"
            return change(message, reply) if change is not None and trained else reply

        return call

    return around


SIZES = [7, 9, 12, 5, 8, 7, 11, 6, 10, 7, 7, 9, 6, 8, 12, 5, 9, 9, 10, 6, 8]


@pytest.fixture
def digits_job():
    """The digits, a job over all of them in round 1, and clients of SIZES examples."""

    def make(task: str = "digits") -> tuple[Examples, Job, list[Client]]:
        world = prepare(Config.from_mapping({"clients": {"count": 3}}))
        torch.manual_seed(0)
        state = arrays_of(world.task.model("")(world.dataset.spec))
        instructions = Instructions(
            task=task,
            spec=world.dataset.spec,
            model=world.task.default_model,
            noise_filter="none",
            moments=None,
            train=world.config.train,
            seed=0,
            update="weights",
            round=1,
            proximal_mu=0.5,
        )
        data = world.dataset.examples
        starts = np.cumsum([0, *SIZES[:-1]])
        own = [
            Client(i + 1, np.arange(a, a + n), i) for i, (a, n) in enumerate(zip(starts, SIZES, strict=True))
        ]
        return data, Job(world.task, instructions, state, data, 0), own

    return make
