"""What agent and training process say to each other over a socket pair, in bounded frames."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Final

from fedge.errors import FormatError
from fedge.wire import MAX_MESSAGE_BYTES

HEAD: Final = struct.Struct(">II")  # length of the JSON, length of the body
MAX_JSON_BYTES: Final = 64 * 1024
MAX_BODY_BYTES: Final = 2 * MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Job:
    """A message for the training process; the body of its frame is the serialised Work."""

    node: dict[str, str]  # the device's own settings for the task
    object: str  # path of the message's object; empty: none
    answer: str  # folder for the object of the answer
    state: str  # folder of the run's state on this device


def job_frame(job: Job, work: bytes) -> bytes:
    """A job as it travels."""
    return _frame(json.dumps(asdict(job)).encode(), work)


def result_frame(result: bytes) -> bytes:
    """A serialised Result as it travels."""
    return _frame(b"", result)


def _frame(head: bytes, body: bytes) -> bytes:
    lengths(HEAD.pack(len(head), len(body)))
    return HEAD.pack(len(head), len(body)) + head + body


def lengths(head: bytes) -> tuple[int, int]:
    """Lengths of JSON and body.

    Raises:
        FormatError: more than a frame may have.
    """
    of_json, of_body = HEAD.unpack(head)
    if of_json > MAX_JSON_BYTES or of_body > MAX_BODY_BYTES:
        raise FormatError(f"frame: {of_json} and {of_body} bytes; at most {MAX_JSON_BYTES}, {MAX_BODY_BYTES}")
    return of_json, of_body
