"""Finished answers on disk until the server has them: a restart of the agent loses none.

`FOLDER/MESSAGE_ID/answer` is a serialised SubmitHeader and is written last; beside it lies the answer's
object, if it has one, under its SHA-256. A folder without `answer` is work that was not finished.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fedge.errors import FedgeError, FormatError
from fedge.files import read_bounded, write_atomically
from fedge.wire import MAX_MESSAGE_BYTES
from fedge.wire.v1.link_pb2 import SubmitHeader
from fedge.wire.v1.records_pb2 import Object, Result

_ANSWER: Final = "answer"
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def is_message_id(text: str) -> bool:
    """Whether it can be the name of a folder; a server sends no other."""
    return _ID.fullmatch(text) is not None


class Outbox:
    """Answers that are not yet with the server."""

    def __init__(self, folder: Path) -> None:
        """Open it; work that was not finished before a restart is removed."""
        self._folder = folder
        self._in_memory: dict[str, Result] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.iterdir():
            if not (path / _ANSWER).exists():
                shutil.rmtree(path, ignore_errors=True)

    def waiting(self) -> list[str]:
        """Ids of messages whose answers wait, the oldest first."""
        answers = [path / _ANSWER for path in self._folder.iterdir() if (path / _ANSWER).exists()]
        kept = [path.parent.name for path in sorted(answers, key=lambda path: path.stat().st_mtime_ns)]
        return [*kept, *self._in_memory]

    def begin(self, message_id: str) -> Path:
        """An empty folder for the object of an answer in the making."""
        self.drop(message_id)
        folder = self._folder / message_id
        folder.mkdir(mode=0o700)
        return folder

    def put(self, message_id: str, result: Result) -> None:
        """Keep an answer; its object lies in the folder already.

        Raises:
            FedgeError: the disk refuses it.
        """
        header = SubmitHeader(message_id=message_id, result=result.SerializeToString())
        try:
            (self._folder / message_id).mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._folder / message_id / _ANSWER, header.SerializeToString(), mode=0o600)
        except OSError as error:
            raise FedgeError(f"outbox: an answer cannot be kept ({error.strerror})") from error

    def put_in_memory(self, message_id: str, result: Result) -> None:
        """Keep an answer without an object until a restart; the message then comes again."""
        self.drop(message_id)
        self._in_memory[message_id] = result

    def get(self, message_id: str) -> tuple[SubmitHeader, Result]:
        """An answer that waits.

        Raises:
            FormatError: it is damaged.
        """
        if (result := self._in_memory.get(message_id)) is not None:
            return SubmitHeader(message_id=message_id, result=result.SerializeToString()), result
        data = read_bounded(self._folder / message_id / _ANSWER, MAX_MESSAGE_BYTES)
        try:
            header = SubmitHeader.FromString(data)
            return header, Result.FromString(header.result)
        except DecodeError as error:
            raise FormatError(f"outbox: the answer to {message_id} is damaged") from error

    def path_of(self, message_id: str, found: Object) -> Path:
        """Where the bytes of an answer's object lie."""
        return self._folder / message_id / found.sha256.hex()

    def drop(self, message_id: str) -> None:
        """Forget an answer, or work in the making."""
        self._in_memory.pop(message_id, None)
        folder = self._folder / message_id
        (folder / _ANSWER).unlink(missing_ok=True)  # first: half a removal must not look like an answer
        shutil.rmtree(folder, ignore_errors=True)
