"""`fedge-client enroll` and `run`: the resident agent."""

from __future__ import annotations

from typing import Any


def add(commands: Any) -> None:
    """Add the subcommands."""
