"""How many examples may be sent: a token bucket (Turner 1986), as values."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import UserError


@dataclass(frozen=True, slots=True)
class Budget:
    """Examples that may go to the cloud."""

    per_hour: float = 3600.0  # over a long time; 0: none
    burst: float = 100.0  # at once, after a quiet time

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            UserError: negative or no number.
        """
        if not (0 <= self.per_hour < float("inf") and 0 <= self.burst < float("inf")):
            raise UserError(
                f"budget: {self.per_hour} examples an hour, {self.burst} at once: must not be negative"
            )


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left of a budget."""

    tokens: float  # examples that may be sent now; not more than the burst
    at: float  # seconds of a monotonic clock, when that was so


def take(budget: Budget, bucket: Bucket, wanted: int, now: float) -> tuple[int, Bucket]:
    """How many of so many examples may be sent now, and what is left then.

    A clock that goes backwards gives nothing and takes nothing.
    """
    elapsed = max(now - bucket.at, 0.0)
    tokens = min(bucket.tokens + elapsed * budget.per_hour / 3600, budget.burst)
    granted = min(wanted, int(tokens))
    return granted, Bucket(tokens - granted, max(now, bucket.at))
