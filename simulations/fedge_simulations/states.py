"""What clients remember from one round to the next (`Context.state`), on disk and by round.

Each state is a safetensors file whose header carries the records that are no arrays. What was kept in a
round that was not committed is void, so a run that was killed goes on with what its clients knew then. Files
are not forced to the disk: they outlive the process, and not a loss of power.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from google.protobuf.message import DecodeError

from fedge import tensors
from fedge.errors import FormatError
from fedge.learning.messages import from_record, to_record
from fedge.wire.records import pack, unpack
from fedge.wire.v1.records_pb2 import Content

FOLDER: Final = "clients"  # in a run folder
_PER_FOLDER: Final = 1000  # clients


class States:
    """The states of all clients; only those that have one cost anything."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find what is there.

        Args:
            folder: where to keep states; None: in memory, for as long as the process lives.
        """
        self._folder = folder
        self._round = 0
        self._memory: dict[int, bytes] = {}
        self._kept: dict[int, list[int]] = {}  # by node id: the rounds of its states, oldest first
        for path in sorted(folder.glob("*/*.safetensors")) if folder is not None else ():
            node_id, _, number = path.stem.partition("-")
            self._kept.setdefault(int(node_id), []).append(int(number))
        for numbers in self._kept.values():
            numbers.sort()
        self._checked = False

    def begin_round(self, number: int) -> None:
        """Go on with this round: what was kept in it or later, by a process that has ended, is void."""
        self._round = number
        if self._checked:
            return
        self._checked = True
        for node_id, numbers in list(self._kept.items()):
            for void in [n for n in numbers if n >= number]:
                self._path(node_id, void).unlink(missing_ok=True)
            self._kept[node_id] = [n for n in numbers if n < number]
            if not self._kept[node_id]:
                del self._kept[node_id]

    def load(self, node_id: int) -> RecordDict:
        """The client's state, empty at first.

        Raises:
            FormatError: its file has been changed.
        """
        if self._folder is None:
            data = self._memory.get(node_id)
            return RecordDict() if data is None else _parse(data)
        numbers = self._kept.get(node_id)
        return _parse(self._path(node_id, numbers[-1]).read_bytes()) if numbers else RecordDict()

    def save(self, node_id: int, state: RecordDict) -> None:
        """Keep what the client remembers after this round; nothing for one that remembers nothing.

        Raises:
            FormatError: it holds what cannot be written.
        """
        if self._folder is None:
            if len(state) > 0 or node_id in self._memory:
                self._memory[node_id] = _dump(state)
            return
        numbers = self._kept.get(node_id, [])
        if len(state) == 0 and not numbers:
            return
        path = self._path(node_id, self._round)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(_dump(state))
        part.replace(path)
        before = [n for n in numbers if n < self._round]
        for old in before[:-1]:  # the newest of an earlier round stays until this round is committed
            self._path(node_id, old).unlink(missing_ok=True)
        self._kept[node_id] = [*before[-1:], self._round]

    def _path(self, node_id: int, number: int) -> Path:
        assert self._folder is not None  # noqa: S101 - narrows the type
        return self._folder / str(node_id // _PER_FOLDER) / f"{node_id}-{number}.safetensors"


def _dump(state: RecordDict) -> bytes:
    arrays: dict[str, Any] = {}
    order: list[dict[str, Any]] = []
    for i, (name, record) in enumerate(state.items()):
        if isinstance(record, ArrayRecord):
            order.append({"name": name, "arrays": list(record)})
            arrays |= {f"{i}/{j}": np.asarray(a) for j, a in enumerate(from_record(record).values())}
        else:
            order.append({"name": name})
    plain = RecordDict({name: r for name, r in state.items() if not isinstance(r, ArrayRecord)})
    content = base64.b64encode(pack(plain).content.SerializeToString(deterministic=True)).decode()
    return tensors.dump(arrays, {"order": json.dumps(order), "records": content})


def _parse(data: bytes) -> RecordDict:
    arrays, metadata = tensors.parse(data)
    try:
        plain = unpack(Content.FromString(base64.b64decode(metadata["records"])))
        state = RecordDict()
        for i, item in enumerate(json.loads(metadata["order"])):
            name = item["name"]
            if "arrays" not in item:
                state[name] = plain[name]
                continue
            values = {key: arrays[f"{i}/{j}"] for j, key in enumerate(item["arrays"])}
            state[name] = to_record(values, shared=False)
    except (KeyError, ValueError, TypeError, DecodeError) as error:
        raise FormatError(f"state of a client: malformed ({type(error).__name__}: {error})") from error
    return state
