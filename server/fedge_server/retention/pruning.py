"""Removes bytes that nothing needs: old releases and runs are retired, then the store is swept.

Retiring is one transaction. What it decided, and whatever killed processes left behind, is then removed
file by file, each time by what the database says at that moment: killed at any point, every object that is
needed is whole, and the next sweep goes on. Whoever puts is waited for, see `registry.store`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import sqlalchemy as sa

from fedge.errors import FedgeError
from fedge.files import is_held
from fedge_server.hub.home import Home
from fedge_server.registry import schema
from fedge_server.registry.database import KEPT_ROUNDS, Registry
from fedge_server.registry.engine import reading, writing
from fedge_server.registry.living import NOTHING, OVER, Retired, kept_models, living, spared
from fedge_server.retention.facts import facts, write
from fedge_server.retention.forgetting import forget
from fedge_server.retention.rule import Keep, retire

GRACE_S: Final = 3600.0  # younger files stay: a fedge from before the lock may be about to name them
PATIENCE_S: Final = 30.0  # for those who put
BATCH: Final = 256  # objects that are removed while whoever puts has to wait
PAUSE_S: Final = 0.05  # between two batches: others come in
PRUNER: Final = "pruning"  # who, in the audit trail, unless a person asked

Kind = Literal["object", "export", "run"]
"""Of a file: in the store, the ONNX of a global model, or the copy of a run's model in its folder."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    retired: Retired  # now; what was retired before is not named again
    files: int
    size: int  # bytes of them


@dataclass(frozen=True, slots=True)
class _File:
    """A file that goes when nothing needs it."""

    kind: Kind
    key: str  # of an object its digest (empty: the rest of one), of an export its model, of a run its name
    path: Path
    size: int  # bytes
    written: float  # Unix seconds


@dataclass(frozen=True, slots=True)
class _Needed:
    """What is needed, as of one moment."""

    objects: frozenset[str]
    models: frozenset[str]  # global ones, whose exports answer devices
    retired: frozenset[str]  # runs, that are over

    @classmethod
    def now(cls, registry: Registry, besides: Retired = NOTHING) -> _Needed:
        """By the database; with `besides` as if that were retired too."""
        with reading(registry.engine) as connection:
            objects = {*living(connection, rounds=KEPT_ROUNDS, besides=besides), *spared(connection)}
            models = kept_models(connection, besides)
            runs = schema.runs.c
            over = connection.execute(sa.select(runs.id, runs.retired).where(runs.status.in_(OVER)))
            retired = {row.id for row in over if row.retired is not None or row.id in besides.runs}
            return cls(frozenset(objects), frozenset(models), frozenset(retired))

    def has(self, file: _File) -> bool:
        """Whether a file is needed."""
        if file.kind == "run":  # of a folder that no run is known of it cannot be told
            return file.key not in self.retired
        return file.key in (self.objects if file.kind == "object" else self.models)


def prune(
    home: Home,
    registry: Registry,
    keep: Keep,
    *,
    who: str = PRUNER,
    dry: bool = False,
    grace_s: float = GRACE_S,
    now: float | None = None,
) -> Pruned:
    """Retire what is too old, and remove all bytes that nothing needs.

    Args:
        home: of the store, the exports and the folders of runs.
        registry: of this home.
        keep: how much is kept.
        who: asks for it, for the audit trail.
        dry: only say what would go.
        grace_s: files that were written later than so many seconds ago stay.
        now: Unix seconds; None: the clock's.

    Raises:
        FedgeError: the database or the disk refuses, or something is being put for all the time that one
            waits; what was removed until then was not needed.
    """
    moment = time.time() if now is None else now
    retired = _decided(registry, keep, moment, "" if dry else who)
    if not dry:
        forget(registry.engine)
    needed = _Needed.now(registry, retired if dry else NOTHING)
    files = [
        each for each in _found(home, registry) if each.written < moment - grace_s and not needed.has(each)
    ]
    removed = files if dry else _remove(home, registry, files)
    return Pruned(retired, len(removed), sum(each.size for each in removed))


def _decided(registry: Registry, keep: Keep, now: float, who: str) -> Retired:
    """What is retired; written down, unless nobody is named."""
    with reading(registry.engine) as connection:  # mostly there is nothing, and no writer has to wait
        found = retire(facts(connection, keep, now), keep)
    if not found or not who:
        return found
    with writing(registry.engine) as connection:
        found = retire(facts(connection, keep, now), keep)
        write(connection, found, who=who, now=now)
    return found


def _found(home: Home, registry: Registry) -> Iterator[_File]:
    """Everything that may ever go: of the store, exports, and the models in the folders of runs."""
    for each in registry.store.lying():
        yield _File("object", each.digest, each.path, each.size, each.written)
    for path in home.exports.glob("*"):
        yield from _file("export", path.name.partition(".")[0], path)  # empty: half of one that was written
    for path in home.runs.glob("*/"):
        yield from _file("run", path.name, home.run_model(path.name))


def _file(kind: Kind, key: str, path: Path) -> Iterator[_File]:
    with suppress(FileNotFoundError):
        state = path.stat()
        yield _File(kind, key, path, state.st_size, state.st_mtime)


def _remove(home: Home, registry: Registry, files: Sequence[_File]) -> list[_File]:
    """Remove what is still not needed, a few at a time; returns it."""
    store, removed = registry.store, list[_File]()
    for start in range(0, len(files), BATCH):
        try:
            with store.removing(patience_s=PATIENCE_S):
                needed = _Needed.now(registry)
                for each in files[start : start + BATCH]:
                    if not needed.has(each) and not _is_at_work(home, each):
                        each.path.unlink(missing_ok=True)
                        removed.append(each)
        except BlockingIOError as error:
            raise FedgeError(
                f"store {store.folder}: something is being put into it all the time; try again later"
            ) from error
        except OSError as error:
            raise FedgeError(f"store {store.folder}: cannot be tidied ({error.strerror or error})") from error
        time.sleep(PAUSE_S)
    return removed


def _is_at_work(home: Home, file: _File) -> bool:
    """Whether it is of a run whose worker is up, whatever the database says."""
    return file.kind == "run" and is_held(home.worker_lock(file.key))
