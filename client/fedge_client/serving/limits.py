"""What the local service takes at most."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import UserError


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on each request, and on all of them together."""

    request_bytes: int = 4 * 1024**2  # of one request's body
    bodies_bytes: int = 32 * 1024**2  # of all bodies that are being read or wait, over HTTP
    examples: int = 256  # of one request
    pixels: int = (
        8_000_000  # of an image before it is scaled: it is unpacked into up to four times as many bytes
    )
    workers: int = 1  # requests that are decoded and answered at a time
    queue: int = 64  # requests that wait for that
    connections: int = (
        256  # over HTTP; when there are more, the one that has been silent for longest is closed
    )
    deadline_s: float = 5.0  # of a request that names none, or a longer one
    read_s: float = 10.0  # that a request may take to come, and an answer to be read

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            UserError: a limit is not positive, or the largest request would not fit into all bodies.
        """
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; a limit must be positive")
        if self.request_bytes > self.bodies_bytes:
            raise UserError(
                f"request_bytes ({self.request_bytes}) is over bodies_bytes ({self.bodies_bytes})"
            )
