"""What long-running commands say: plain lines, or one JSON object a line; and the records of security.

A record's fields are the attributes that its call site gives as `extra`: `device`, `run`, `round` and the
like. Plain lines leave them out, since the message says them in words.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final, TextIO

FORMATS: Final = ("text", "json")
SERVER: Final = "%(asctime)s %(levelname)s %(message)s"  # plain lines of the server's commands
MAX_TEXT: Final = 2000  # characters of a field: what a stranger sends must not fill the log

EVENTS: Final = MappingProxyType(
    {
        "certificate_refused": "a call of a device was refused because of its certificate, or its revocation",
        "enrolment_refused": "a stranger, or a device that asks for a new certificate, was refused",
        "foreign_request": "a device asked for what is another device's or another tier's",
        "answer_refused": "a device's answer to a message was no answer that can be taken in",
        "update_rejected": "a client's update was left out of its round for what no honest device does",
        "update_stands_out": "a client's update was used, and is far from those of the others in its round",
        "verification_failed": "a device did not install a release, or it did not pass its trial there",
        "report_refused": "a device reported what no honest device reports",
        "signature_refused": "a signer would not sign, or somebody asked it who may not",
        "release_refused": "on the device: a release was not taken, because something about it is wrong",
        "server_refused": "on the device: the server refuses this device, or does not prove who it is",
    }
)
"""Names of all records of `fedge.security`, and what each says; names stay as they are."""

_security: Final = logging.getLogger("fedge.security")
_KNOWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def security(event: str, message: str, *values: object, **fields: object) -> None:
    """Say that something was refused, in a record that whoever watches can find by its name.

    Args:
        event: one of `EVENTS`.
        message: for people, with the values put in as logging does.
        values: of the message.
        fields: of the record: device, tier, run, reason and the like; whatever is None is left out.
    """
    if event not in EVENTS:
        raise ValueError(f"{event!r} is no event of security")
    known = {name: value for name, value in fields.items() if value is not None}
    _security.warning(message, *values, extra={"event": event, **known})


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (RFC 3339, UTC), level, logger, message, and its fields.

    Args:
        fields: of every record, such as the run of a worker.
    """

    def __init__(self, **fields: object) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        given = {name: value for name, value in vars(record).items() if name not in _KNOWN}
        for name, value in {**self._fields, **given}.items():
            said.setdefault(name, _plain(value))
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, allow_nan=False)


def _plain(value: object) -> object:
    """What JSON can say of a value; NaN and infinities as text, since JSON has none."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and value - value == 0:
        return value
    return str(value)[:MAX_TEXT]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--log-format`."""
    parser.add_argument(
        "--log-format", choices=FORMATS, default="text", help="of what it says on stderr (default: text)"
    )


def start(
    form: str,
    *,
    text: logging.Formatter,
    level: int = logging.INFO,
    stream: TextIO | None = None,
    **fields: object,
) -> None:
    """Let this process's records go to a stream.

    Args:
        form: one of `FORMATS`.
        text: how plain lines look.
        level: of records that no logger's own level lets through.
        stream: by default stderr.
        fields: of every record, in JSON.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(**fields) if form == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def message_of(line: str) -> str:
    """What a line of either format says; of no JSON that is a record, the line itself."""
    try:
        found = json.loads(line)
        return str(found["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return line
