"""The `Context.state` of a run, kept on the device between messages, training processes and restarts.

Two generations are kept. An answer that was lost with the agent is computed again from the state that was
before it, so no message changes the state twice.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from flwr.app import RecordDict

from fedge.errors import FedgeError, FormatError
from fedge.files import read_bounded, write_atomically
from fedge.wire.records import pack, unpack, write_object
from fedge.wire.v1.records_pb2 import Content

_FILE: Final = "state.json"
_MAX_BYTES: Final = 64 * 1024**2


def before(folder: Path, message_id: str) -> RecordDict:
    """The state with which this message begins; empty where the run has none.

    Raises:
        FormatError: its files are damaged.
    """
    kept = _load(folder)
    encoded = kept["before"] if kept["message_id"] == message_id else kept["content"]
    if not encoded:
        return RecordDict()
    try:
        content = Content.FromString(base64.b64decode(encoded))
    except ValueError as error:  # protobuf's DecodeError is one
        raise FormatError(f"{folder / _FILE}: damaged ({error}); remove the folder") from error
    return unpack(content, folder / content.object.sha256.hex() if content.object.size else None)


def after(folder: Path, message_id: str, state: RecordDict) -> None:
    """Keep the state that this message left behind.

    Raises:
        FedgeError: the disk refuses it, or a value cannot be kept.
    """
    if not state and not (folder / _FILE).exists():
        return
    kept = _load(folder)
    older = kept["before"] if kept["message_id"] == message_id else kept["content"]
    packed = pack(state)
    try:
        write_object(folder, packed)
        newer = base64.b64encode(packed.content.SerializeToString()).decode()
        saved = {"message_id": message_id, "content": newer, "before": older}
        write_atomically(folder / _FILE, json.dumps(saved).encode(), mode=0o600)
    except OSError as error:
        raise FedgeError(f"{folder}: the state of the run cannot be kept ({error.strerror})") from error
    needed = {_FILE, packed.content.object.sha256.hex(), _object_of(older)}
    for path in folder.iterdir():
        if path.name not in needed:
            path.unlink()


def _object_of(encoded: str) -> str:
    content: Content = Content.FromString(base64.b64decode(encoded))
    return content.object.sha256.hex()


def _load(folder: Path) -> Mapping[str, str]:
    if not (folder / _FILE).exists():
        return {"message_id": "", "content": "", "before": ""}
    try:
        found: Any = json.loads(read_bounded(folder / _FILE, _MAX_BYTES))
    except ValueError as error:
        raise FormatError(f"{folder / _FILE}: damaged; remove the folder") from error
    names = {"message_id", "content", "before"}
    if not isinstance(found, dict) or found.keys() != names or not all(map(_is_text, found.values())):
        raise FormatError(f"{folder / _FILE}: damaged; remove the folder")
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)
