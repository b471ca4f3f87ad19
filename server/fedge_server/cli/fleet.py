"""`fedge-server token`, `devices` and `ca`: who may connect."""

from __future__ import annotations

from typing import Any


def add(commands: Any) -> None:
    """Add the subcommands."""
