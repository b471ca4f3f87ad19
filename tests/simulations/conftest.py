"""Small worlds for tests: scikit-learn's digits, few clients, one linear layer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedge.config import Config
from fedge_server import app as server_app
from fedge_server.rounds.loop import Learned
from fedge_server.rounds.record import RoundRecord
from fedge_simulations.grid import RUN_ID, SERVER_NODE, ClientCall
from fedge_simulations.trainers import Trainers
from fedge_simulations.world import prepare

Tamper = Callable[[Message, Message], Message]
"""Replace a client's reply: (what it was sent, what it would answer) to what it answers."""


class Interrupted(Exception):  # noqa: N818 - stands for a power cut
    """The server died here."""


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
