"""What a search has made so far, kept in a folder: one that was stopped or killed goes on from there.

A shelf belongs to one teacher, one set of data, one seed and one set of stages; another search has another
folder, named by a digest over all of them. Searches of one task on data of one place lie together: students
go on from what the last of them taught, and never from another task's. Files are written whole or not at all;
a damaged one is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import numpy as np

from fedge import tensors
from fedge.config import Compress, Config, Gate
from fedge.errors import FedgeError
from fedge.files import read_bounded, sha256, write_atomically
from fedge.learning.state import NamedArrays, arrays_of
from fedge.learning.whole import WholeModel
from fedge.task import Task
from fedge.task_digest import task_digest

_VERSION: Final = 2  # of what stages do: raised when the same settings give something else
MAX_TASKS: Final = 16  # whose searches are kept, each with its place of data
_OURS: Final = "[0-9a-f]" * 16 + "/"  # names of folders: what else lies beside them is not ours to remove
_MAX_BYTES: Final = 2**31 - 1
_DIGEST_BYTES: Final = 64  # a graph's file begins with the digest of the rest, in hexadecimal digits


class Shelf:
    """Trained networks and built graphs by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, root: Path, teacher: WholeModel, task: Task, data: bytes, config: Config) -> Self:
        """The shelf of a search among those in `root`; `data` identifies what students learn from."""
        sha = hashlib.sha256(
            tensors.dump({n: np.ascontiguousarray(v) for n, v in arrays_of(teacher).items()})
        )
        sha.update(data)
        # Time, forms and gate decide which candidates there are, not what each of them is.
        stages = replace(config.compress, max_seconds=1.0, forms=(), gate=Gate())
        sha.update(json.dumps([_VERSION, config.seed, task.name, _section(stages)], sort_keys=True).encode())
        sha.update(task_digest(config.task).encode())
        kin = hashlib.sha256(json.dumps([task.name, task_digest(config.task), config.data]).encode())
        return cls(root / kin.hexdigest()[:16] / sha.hexdigest()[:16])

    def before(self) -> Mapping[str, NamedArrays]:
        """Networks of the newest other search of the same task, by name, as far as they can be read."""
        newest = next(iter(self._others()), None)
        found = {}
        for path in sorted(newest.glob("*.safetensors")) if newest is not None else []:
            if (kept := Shelf(path.parent).network(path.stem)) is not None:
                found[path.stem] = kept[0]
        return found

    def tidy(self) -> None:
        """Remove all other searches of this task but the newest, and tasks not seen for long."""
        tasks = [each for each in self.folder.parent.parent.glob(_OURS) if each != self.folder.parent]
        flat = [each for each in tasks if any(each.glob("*.*"))]  # of an earlier fedge: files and no searches
        for folder in (*self._others()[1:], *flat, *_newest_first(tasks)[MAX_TASKS - 1 :]):
            shutil.rmtree(folder, ignore_errors=True)

    def _others(self) -> list[Path]:
        return _newest_first(each for each in self.folder.parent.glob(_OURS) if each.name != self.folder.name)

    def network(self, name: str) -> tuple[NamedArrays, float] | None:
        """What a network had learned, and the seconds that it took; None: it is not here."""
        try:
            arrays, about = tensors.load(self._path(name, "safetensors"))
            return arrays, float(about["seconds"])
        except (FedgeError, OSError, KeyError, ValueError):
            return None

    def keep_network(self, name: str, arrays: NamedArrays, seconds: float) -> None:
        """Put it here."""
        data = tensors.dump(arrays, {"seconds": repr(seconds)})
        self._write(self._path(name, "safetensors"), data)

    def graph(self, name: str) -> bytes | None:
        """A candidate's ONNX; None: it is not here."""
        try:
            data = read_bounded(self._path(name, "onnx"), _MAX_BYTES)
        except (FedgeError, OSError):
            return None
        digest, graph = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return graph if sha256(graph).encode() == digest else None

    def keep_graph(self, name: str, graph: bytes) -> None:
        """Put it here."""
        self._write(self._path(name, "onnx"), sha256(graph).encode() + graph)

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}"


def _section(settings: Compress) -> str:
    return replace(Config(), compress=settings).section_json("compress")


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda each: each.stat().st_mtime, reverse=True)
