"""The model that answers, and its exchange while requests are under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from fedge.errors import AbsentError

M = TypeVar("M")


class _Held(Generic[M]):
    __slots__ = ("leases", "model", "retired")

    def __init__(self, model: M) -> None:
        self.model, self.leases, self.retired = model, 0, False


class Holder(Generic[M]):
    """Hands the current model to each request; safe from any thread.

    A request keeps the model that it began with. After `swap` the old one is closed when the last request
    that has it ends: no request is dropped, and no two answer from one model's halves.

    Args:
        model: that answers now; None: none is installed yet.
        close: called once with each model that has been replaced, by whoever used it last.
    """

    def __init__(self, model: M | None = None, close: Callable[[M], None] = lambda _: None) -> None:
        self._lock = threading.Lock()
        self._close = close
        self._held = None if model is None else _Held(model)
        self.swaps = 0

    @property
    def current(self) -> M | None:
        """The model that answers now."""
        held = self._held
        return None if held is None else held.model

    @contextmanager
    def lease(self) -> Iterator[M]:
        """The current model, for one request.

        Raises:
            AbsentError: none is installed yet.
        """
        with self._lock:
            held = self._held
            if held is None:
                raise AbsentError("no model is installed on this device yet")
            held.leases += 1
        try:
            yield held.model
        finally:
            with self._lock:
                held.leases -= 1
                last = held.retired and not held.leases
            if last:
                self._close(held.model)

    def swap(self, model: M) -> None:
        """Let another model answer all requests that begin from now on."""
        with self._lock:
            old, self._held = self._held, _Held(model)
            self.swaps += 1
            if old is None:
                return
            old.retired = True
            unused = not old.leases
        if unused:
            self._close(old.model)
