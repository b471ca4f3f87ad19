"""A tier's budgets against what a candidate costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedge.config import Tier


@dataclass(frozen=True, slots=True)
class Figure:
    """One budget of a tier and a candidate's value, in the budget's unit."""

    key: str  # of the tier's configuration
    value: float
    limit: float
    slack: float = 1.0  # the value may be so many times the limit

    @property
    def met(self) -> bool:
        """Whether the budget is kept."""
        return self.value <= self.limit * self.slack

    def __str__(self) -> str:
        return f"{self.key} is {_number(self.limit)}, it needs {_number(self.value)}"


def figures(
    tier: Tier, *, wire_bytes: int, memory_bytes: int, latency_us: float, latency_slack: float = 1.0
) -> tuple[Figure, ...]:
    """A candidate's value for each budget that the tier has."""
    values: dict[str, tuple[float, float]] = {
        "max_wire_bytes": (wire_bytes, 1.0),
        "max_memory_bytes": (memory_bytes, 1.0),
        "max_latency_ms": (latency_us / 1000, latency_slack),
    }
    limits: dict[str, float | None] = {key: getattr(tier, key) for key in values}
    return tuple(
        Figure(key, values[key][0], limit, values[key][1])
        for key, limit in limits.items()
        if limit is not None
    )


def shortage(candidates: Mapping[str, tuple[Figure, ...]]) -> str:
    """Why none of these candidates (by name) keeps all budgets, with the nearest miss of each budget.

    Each candidate must have at least one figure that is not met.
    """
    missed = []
    for position in range(len(next(iter(candidates.values()), ()))):
        best, figure = min(
            ((name, row[position]) for name, row in candidates.items()), key=lambda item: item[1].value
        )
        if not figure.met:
            missed.append(
                f"{figure.key} = {_number(figure.limit)}, but the least is {_number(figure.value)} ({best})"
            )
    if missed:
        return "; ".join(missed)
    name, row = min(
        candidates.items(), key=lambda item: max(figure.value / figure.limit for figure in item[1])
    )
    over = "; ".join(str(figure) for figure in row if not figure.met)
    return f"each budget can be kept, but not all at once; nearest is {name}: {over}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
