"""A hub that is up takes devices back by itself, whatever goes wrong; it asks less and less often."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import FedgeError
from fedge_server.hub import returning
from fedge_server.hub.home import Home


class Script:
    """What looks find, one after the other; the last look ends the test."""

    def __init__(self, *found: tuple[list[str], str] | Exception) -> None:
        self.found, self.over = list(found), asyncio.Event()

    def __call__(self, *_: Any) -> tuple[list[str], str]:
        one = self.found.pop(0)
        if not self.found:
            self.over.set()
        if isinstance(one, Exception):
            raise one
        return one


def play(monkeypatch: pytest.MonkeyPatch, *found: Any, tell: Any = None) -> tuple[int, list[float]]:
    """How often devices were told, and the pauses between looks in units of the first."""
    told, pauses = 0, list[float]()

    async def told_once() -> None:
        nonlocal told
        told += 1
        if tell is not None:
            raise tell

    async def main() -> None:
        script, sleep = Script(*found), asyncio.sleep

        async def slept(seconds: float) -> None:
            pauses.append(seconds)
            await sleep(0)

        async def at_once(work: Any, *arguments: Any) -> Any:
            return work(*arguments)

        monkeypatch.setattr(returning, "_take_back", script)
        monkeypatch.setattr(returning.asyncio, "sleep", slept)
        monkeypatch.setattr(returning.asyncio, "to_thread", at_once)
        nothing: Any = None
        task = asyncio.create_task(
            returning.take_back_always(Home(Path("home")), nothing, nothing, told_once, look_s=1.0)
        )
        await script.over.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    return told, pauses


def test_what_was_done_is_told_to_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    told, pauses = play(monkeypatch, ([], ""), (["release 3 brings the content of 1 back"], ""), ([], ""))
    assert (told, set(pauses)) == (1, {1.0})


def test_a_signer_that_is_away_is_asked_less_and_less_often_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away: tuple[list[str], str] = ([], "awaits its signature")
    _, pauses = play(monkeypatch, *[away] * 8, (["done"], ""), ([], ""))
    assert pauses[:10] == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1]


def test_whatever_goes_wrong_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told, _ = play(
        monkeypatch, RuntimeError("disk"), (["done"], ""), ([], ""), tell=FedgeError("repository is away")
    )
    assert told == 1
