"""What a device collects of its answers, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import UserError
from fedge.telemetry.privacy import Budget
from fedge.telemetry.window import PERIODS_S


@dataclass(frozen=True, slots=True)
class Settings:
    """What is collected, and how often.

    Raises:
        UserError: a number is out of range.
    """

    period_s: int = 3600
    keep_every_s: float = 60.0  # a kill loses no more than this of the window under way
    epsilon: float | None = None  # for one answer in a window; None: no noise
    most_epsilon: float | None = None  # over all windows; None: no limit
    keep: int = 200  # closed windows that wait for the server, 16 KiB each at most

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not PERIODS_S[0] <= self.period_s <= PERIODS_S[1]:
            raise UserError(
                f"telemetry: period_s = {self.period_s}: must be {PERIODS_S[0]} to {PERIODS_S[1]}"
            )
        if not self.keep_every_s >= 0:
            raise UserError(f"telemetry: keep_every_s = {self.keep_every_s:g}: must be 0 or more")
        if not 1 <= self.keep <= 10_000:
            raise UserError(f"telemetry: keep = {self.keep}: must be 1 to 10000")
        if self.epsilon is not None:
            Budget(self.epsilon, self.most_epsilon)
        elif self.most_epsilon is not None:
            raise UserError("telemetry: most_epsilon needs epsilon, the part of each window")

    def budget(self, windows: int) -> Budget | None:
        """What may be told after so many windows; None: there is no noise."""
        return None if self.epsilon is None else Budget(self.epsilon, self.most_epsilon, windows)
