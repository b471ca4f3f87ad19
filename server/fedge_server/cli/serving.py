"""`fedge-server init`, `up`, `preflight`, `backup` and `restore`."""

from __future__ import annotations

from typing import Any


def add(commands: Any) -> None:
    """Add the subcommands."""
