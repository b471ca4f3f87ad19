"""A circuit breaker (Nygard 2007, Release It!): a cloud that does not answer is left alone for a while.

closed: requests go. After so many failures in a row it is open: none goes, for a time that doubles with each
opening. Then one trial goes; its success closes the breaker, its failure opens it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedge.errors import UserError


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When it opens, and for how long."""

    failures: int = 5  # in a row
    first_s: float = 1.0  # that it is open the first time
    most_s: float = 60.0  # that it is open at most
    trial_s: float = 10.0  # after which a trial that was never heard of again is forgotten

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            UserError: a number is not positive.
        """
        if not (self.failures >= 1 and 0 < self.first_s <= self.most_s and self.trial_s > 0):
            raise UserError(
                "breaker: failures, first_s and trial_s must be positive, most_s at least first_s"
            )


@dataclass(frozen=True, slots=True)
class Breaker:
    """Its state; times are seconds of a monotonic clock."""

    failures: int = 0  # in a row
    opened: int = 0  # times in a row, without a success between; 0: closed
    until: float = 0.0  # no request before that, where it is open
    trial: bool = False  # one goes now, and decides

    def ask(self, settings: BreakerSettings, now: float) -> tuple[bool, Breaker]:
        """Whether a request may go, and the state then: where it is a trial, no other goes beside it."""
        if not self.opened:
            return True, self
        if now < self.until:
            return False, self
        return True, replace(self, until=now + settings.trial_s, trial=True)

    def succeeded(self) -> Breaker:
        """After an answer."""
        return Breaker()

    def failed(self, settings: BreakerSettings, now: float, jitter: float) -> Breaker:
        """After a request that was not answered.

        Args:
            settings: of the breaker.
            now: the time.
            jitter: a number from 0 to 1, drawn: a fleet must not come back at one moment (Brooker 2015).
        """
        if not self.opened and self.failures + 1 < settings.failures:
            return replace(self, failures=self.failures + 1)
        if self.opened and not self.trial:
            return self  # of a request that had gone before it opened
        pause = min(settings.most_s, settings.first_s * 2.0 ** min(self.opened, 32))
        return Breaker(settings.failures, self.opened + 1, now + pause * (0.5 + 0.5 * jitter))
