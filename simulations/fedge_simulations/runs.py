"""Runs that lie in folders, finished or not: what `fedge-sim compare` and `sweep` read of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fedge.config import Config
from fedge.errors import ConfigError, UserError
from fedge.files import is_held, sha256
from fedge_server.page import flat
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import DATABASE
from fedge_server.rounds.record import RoundRecord

LOCK: Final = "run.lock"  # held in a run folder by the process that runs there
SUMMARY: Final = "summary.json"

State = Literal["finished", "running", "interrupted"]


@dataclass(frozen=True, slots=True)
class Past:
    """A run as its folder tells it."""

    name: str  # what it is called among others
    folder: Path
    run_id: str
    task: str
    seed: int
    settings: Mapping[str, Any]  # the configuration by dotted keys, defaults included
    records: tuple[RoundRecord, ...]  # rounds 1 .. last
    state: State

    @property
    def last(self) -> int:
        """Its last committed round; 0: none."""
        return self.records[-1].round if self.records else 0


def run_id_of(config: Config) -> str:
    """The name of the run of a configuration in its run folder."""
    return f"run-{sha256(json.dumps(config.to_mapping(), sort_keys=True).encode())[:12]}"


def committed(folder: Path, config: Config) -> int:
    """The last committed round of an unfinished run of this configuration in a folder; 0: there is none."""
    if not (folder / DATABASE).exists() or (folder / SUMMARY).exists():
        return 0
    return max((past.last for past in read(folder, "") if past.run_id == run_id_of(config)), default=0)


def find(folders: Sequence[Path], within: Path | None = None) -> list[Past]:
    """The runs in these folders: run folders, or folders of them such as a sweep's.

    Args:
        folders: where to look.
        within: a folder that the names of runs are relative to; None: they are as given.

    Raises:
        UserError: a folder is absent or holds no run.
        FedgeError: a database cannot be read.
    """
    found: dict[Path, Past] = {}
    for folder in folders:
        inside = [past for home in _homes(folder) for past in read(home, _called(within or folder, home))]
        for past in inside:
            found.setdefault(past.folder.resolve() / past.run_id, past)
    return list(found.values())


def read(home: Path, name: str) -> list[Past]:
    """The runs of a folder that holds a database, oldest first."""
    with Registry.open(home) as registry:
        rows = registry.runs()
        records = {row["id"]: tuple(registry.records(row["id"])[1:]) for row in rows}
    return [
        Past(
            name=name if len(rows) == 1 else f"{name}:{row['id']}",
            folder=home,
            run_id=row["id"],
            task=row["task"],
            seed=row["seed"],
            settings=_settings(row["config"]),
            records=records[row["id"]],
            state=_state(home, row),
        )
        for row in rows
    ]


def _homes(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; name the --out of a run or of a sweep")
    if (folder / DATABASE).exists():
        yield folder
        return
    inner = sorted(path.parent for path in folder.glob(f"*/{DATABASE}"))
    if not inner:
        raise UserError(f"{folder}: holds no run; name the --out of `fedge-sim run` or `fedge-sim sweep`")
    yield from inner


def _called(given: Path, home: Path) -> str:
    return str(home if home == given else home.relative_to(given))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """All keys with their values; those that an older fedge wrote stay as they are."""
    try:
        return flat(Config.from_mapping(config).to_mapping())
    except ConfigError:
        return flat(config)


def _state(home: Path, row: Mapping[str, Any]) -> State:
    if (home / SUMMARY).exists() or row["status"] == "done":
        return "finished"
    if is_held(home / LOCK):
        return "running"
    server_says = row["status"] == "running" and (home / "hub.lock").exists()
    return "running" if server_says else "interrupted"
