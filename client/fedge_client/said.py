"""What the resident commands of a device say on stderr."""

from __future__ import annotations

import logging
import os

from fedge import logs


def start(log_format: str, own: logging.Logger) -> None:
    """Records to stderr, in text or JSON; INFO of our own alone. The journal has the time of plain lines."""
    form = "%(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(message)s"
    plain = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S%z")
    logs.start(log_format, text=plain, level=logging.WARNING)
    own.setLevel(logging.INFO)
