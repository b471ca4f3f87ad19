"""What a Grid has really carried, where it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from flwr.serverapp import Grid


@runtime_checkable
class Metered(Protocol):
    """A Grid that counts what it carries, from its beginning on."""

    late: int  # answers that came after nobody waited for them
    bytes_down: int  # of tensors
    bytes_up: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """A Grid's counters at one time, or their difference between two."""

    late: int
    bytes_down: int
    bytes_up: int

    @classmethod
    def of(cls, grid: Grid) -> Self | None:
        """The counters now; None when the Grid has none."""
        return cls(grid.late, grid.bytes_down, grid.bytes_up) if isinstance(grid, Metered) else None

    def since(self, before: Traffic) -> Traffic:
        """What has been counted since then."""
        return Traffic(
            self.late - before.late, self.bytes_down - before.bytes_down, self.bytes_up - before.bytes_up
        )
