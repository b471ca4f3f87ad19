"""The Flower ServerApp: reads its configuration from the run, learns, and leaves all in the registry.

The same app runs in every world; only where the server's data comes from differs, so that is its argument.
`run_config` keys: `fedge-config` (the whole configuration as JSON, or the path of a `.toml` file on this
machine), `fedge-home`, `fedge-run`, `fedge-database` (a URL; absent: SQLite in the home); every other key is
an override such as `rounds.count`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedge.config import Config, override
from fedge.errors import ConfigError, FedgeError
from fedge.task import Task, resolve
from fedge_server.data import ServerData, own_data
from fedge_server.registry.database import Registry
from fedge_server.rounds.loop import Learned, Observer, learn

CONFIG, HOME, RUN, DATABASE = "fedge-config", "fedge-home", "fedge-run", "fedge-database"

DataOf = Callable[[Config, Task], ServerData]
"""The server's own data for a run."""


def run_config(
    config: Config, home: Path, run_id: str, database: str | None = None
) -> dict[str, bool | float | int | str]:
    """What a Grid's context carries so that `build`'s app runs this configuration."""
    return {
        CONFIG: json.dumps(config.to_mapping()),
        HOME: str(home),
        RUN: run_id,
        **({DATABASE: database} if database else {}),
    }


def config_of(context: Context) -> Config:
    """The configuration of a run, overrides applied.

    Raises:
        ConfigError: a key or value is wrong.
    """
    text = str(context.run_config.get(CONFIG, "{}"))
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in context.run_config.items()
        if key not in (CONFIG, HOME, RUN, DATABASE)
    ]
    if text.endswith(".toml"):
        return Config.load(Path(text), overrides)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"run_config {CONFIG!r}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"run_config {CONFIG!r}: must be a table, not a {type(values).__name__}")
    return Config.from_mapping(override(values, overrides))


def build(
    data_of: DataOf, observe: Observer = lambda _: None, done: Callable[[Learned], None] = lambda _: None
) -> ServerApp:
    """A ServerApp with the server's data from `data_of`; `observe` hears of rounds, `done` of the result.

    The run is done when `done` returns: a server that dies in it finds the run still running.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        logging.getLogger("flwr").setLevel(
            logging.WARNING
        )  # `observe` reports rounds; Flower's lines repeat it
        config = config_of(context)
        task = resolve(config.task)
        home = Path(str(context.run_config.get(HOME) or os.environ.get("FEDGE_HOME", "fedge-home")))
        run_id = str(context.run_config.get(RUN) or f"run-{context.run_id}")
        database = context.run_config.get(DATABASE)
        with Registry.open(home, str(database) if database else None) as registry:
            learned = learn(grid, config, task, data_of(config, task), registry, run_id, observe)
            try:
                done(learned)
            except FedgeError as error:
                registry.end_run(run_id, "failed", str(error))
                raise
            registry.end_run(run_id, "done", learned.reason)

    return server


app = build(own_data)
