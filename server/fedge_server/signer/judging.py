"""Decide whether to sign for a tier: the common rules, the signer's own limits, and what it signed before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from securesystemslib.signer import Key, Signature

from fedge.delivery import role_of
from fedge.errors import RefusedError
from fedge_server.repository import FileSigning, Request, reasons_against
from fedge_server.signer.limits import Limits
from fedge_server.signer.memory import Memory

Clock = Callable[[], datetime]


class Judge:
    """A tier's key with its memory and limits: `Signing` for whoever may reach it."""

    def __init__(
        self,
        tier: str,
        signing: FileSigning,
        memory: Memory,
        limits: Limits = Limits(),  # noqa: B008 - it is frozen
        clock: Clock = lambda: datetime.now(UTC),
    ) -> None:
        self.tier, self.memory = tier, memory
        self._signing, self._limits, self._clock = signing, limits, clock
        self._turn = threading.Lock()

    @property
    def key(self) -> Key:
        """The public part."""
        return self._signing.key

    def sign(self, request: Request) -> Signature:
        """A signature over the payload, remembered before it is given.

        Raises:
            RefusedError: one of the rules is against it.
            FedgeError: the memory cannot be read or written.
        """
        with self._turn:
            last = self.memory.last()
            if last != request.payload:  # else the reply was lost: the same bytes, the same signature
                self._check(request, last)
                self.memory.keep(request.payload)
            return self._signing.sign(request)

    def _check(self, request: Request, last: bytes | None) -> None:
        if request.role != role_of(self.tier):
            raise RefusedError(f"this signer signs for tier {self.tier!r} alone", request.role)
        known = replace(request, previous=last)
        reasons = (*reasons_against(known), *self._limits.reasons_against(known, self._clock()))
        if reasons:
            raise RefusedError("; ".join(reasons), request.role)
