"""What the Inference service takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on requests, on what waits, and on what is held open."""

    max_examples: int = 256  # of one request
    batch_examples: int = 64  # that go through a model at once; more wait for the next batch
    batch_wait_s: float = 0.002  # that the first of a batch waits for others to come
    waiting_examples: int = 1024  # of one model; beyond that requests are refused at once
    in_flight: int = 16  # requests of one device at a time
    models: int = 4  # releases that are open at a time
    model_bytes: int = 1024**3  # of their files together
    threads: int = 1  # that run models, one batch each at a time
    deadline_s: float = 10.0  # of a request whose caller names none, or a longer one

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            ConfigError: a limit is not positive, or a request would not fit into what may wait.
        """
        for name in ("max_examples", "batch_examples", "waiting_examples", "in_flight", "models", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"inference.{name} is {getattr(self, name)}; it must be 1 or more")
        if not (self.model_bytes > 0 and self.deadline_s > 0 and self.batch_wait_s >= 0):
            raise ConfigError(
                "inference: model_bytes and deadline_s must be positive, batch_wait_s not negative"
            )
        if self.waiting_examples < self.max_examples:
            raise ConfigError(
                f"inference.waiting_examples is {self.waiting_examples}, below max_examples "
                f"({self.max_examples}): the largest request would always be refused"
            )
