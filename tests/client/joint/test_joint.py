"""Device and cloud together: whatever the cloud does, each request is answered once, by its deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedge.errors import AbsentError, DataError, LateError, UserError
from fedge.routing import CLOUD_ONLY, DEVICE_ONLY, Routing, Rule, Wanted
from fedge.spec import Spec
from fedge_client.joint import BreakerSettings, Budget, CloudAnswer, CloudError, Joint, JointSettings
from fedge_client.runtime import Runtime
from fedge_client.serving.holder import Holder

SPEC = Spec("features", (2,), "float32", ("no", "yes"))
SURE, UNSURE = [8.0, 0.0], [0.1, 0.0]  # logits of this file's variant: confidence 0.9997 and 0.525


@pytest.fixture
def holder(tools: Any) -> Holder[Runtime]:
    """A variant whose logits are its input."""
    return holder_of(tools)


def holder_of(tools: Any, version: int = 5, **evidence: Any) -> Holder[Runtime]:
    from fedge.inference import CompactModel

    model = tools.linear_model(SPEC, np.eye(2), np.zeros(2))
    entry, _ = tools.entry_of("micro", model, evidence=evidence)
    release = tools.release_of(version, (entry,), spec=SPEC)
    return Holder(Runtime(SimpleNamespace(release=release, entry=entry), CompactModel(model, SPEC)))


class Scripted:
    """A cloud that answers the second label, or does what it is told."""

    def __init__(self, act: Callable[[], Any] | None = None) -> None:
        self.act, self.batches, self.x = act, [], []

    async def ask(self, x: Any, spec: Spec, version: int, timeout_s: float) -> CloudAnswer:
        self.batches.append(len(x))
        self.x.append(x)
        if self.act is not None and (found := await self.act()) is not None:
            return found
        return CloudAnswer(np.tile(np.array([0.1, 0.9], np.float32), (len(x), 1)), version, "m" * 64)


def settings(**values: Any) -> JointSettings:
    return JointSettings(**{"rule": Rule("confidence", 0.2), "deadline_s": 10.0, **values})


def run(
    holder: Any, cloud: Any, x: Any, times: int = 1, deadline_s: float | None = None, **values: Any
) -> Any:
    async def scenario() -> Any:
        joint = Joint(holder, cloud, settings(**values))
        try:
            found = []
            for _ in range(times):
                began = time.monotonic()
                answers = await joint.infer(np.array(x, np.float32), deadline_s)
                found.append((answers, time.monotonic() - began))
            return found, joint.counts
        finally:
            await joint.close()

    return asyncio.run(scenario())


def test_what_the_device_is_sure_of_stays_and_the_rest_goes_in_one_question(holder: Any) -> None:
    cloud = Scripted()
    [(answers, _)], counts = run(holder, cloud, [SURE, UNSURE, SURE, UNSURE])
    assert [(a.source, a.why, a.prediction.label, a.version) for a in answers] == [
        ("device", "sure", "no", 5),
        ("cloud", "asked", "yes", 5),
    ] * 2
    assert answers[1].prediction.confidence == pytest.approx(0.9)
    assert (answers[0].model != answers[1].model, answers[1].model) == (True, "m" * 64)
    assert cloud.batches == [2]
    assert cloud.x[0].tolist() == np.array([UNSURE, UNSURE], np.float32).tolist()
    assert counts == {"sure": 2, "asked": 2}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"private": True}, "private"),
        ({"budget": Budget(0, 0)}, "budget"),
        ({"rule": DEVICE_ONLY}, "sure"),
    ],
)
def test_where_nothing_may_leave_nothing_is_sent(holder: Any, values: dict[str, Any], why: str) -> None:
    cloud = Scripted()
    [(answers, _)], _ = run(holder, cloud, [UNSURE], **values)
    assert [(a.source, a.why) for a in answers] == [("device", why)]
    assert cloud.batches == []
    assert run(holder, None, [UNSURE])[1] == {"private": 1}


def test_the_cloud_alone_can_be_asked(holder: Any) -> None:
    assert run(holder, Scripted(), [SURE], rule=CLOUD_ONLY)[1] == {"asked": 1}


def test_of_a_budget_that_does_not_reach_the_most_doubtful_are_sent(holder: Any) -> None:
    cloud = Scripted()
    [(answers, _)], _ = run(holder, cloud, [[0.3, 0], [0.1, 0], [0.2, 0]], budget=Budget(0, 2))
    assert [a.why for a in answers] == ["budget", "asked", "asked"]


async def never() -> None:
    await asyncio.Event().wait()


async def stubborn() -> None:
    """Does not end when it is cancelled, once."""
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        await asyncio.sleep(0.5)


async def down() -> None:
    raise CloudError("down", "UNAVAILABLE")


async def bug() -> None:
    raise RuntimeError("no error of ours")


async def short() -> CloudAnswer:
    return CloudAnswer(np.zeros((7, 2), np.float32), 5, "")


@pytest.mark.parametrize(
    ("act", "why"), [(never, "late"), (stubborn, "late"), (down, "down"), (bug, "down"), (short, "garbage")]
)
def test_when_the_cloud_fails_the_device_answers_by_the_deadline(holder: Any, act: Any, why: str) -> None:
    [(answers, seconds)], counts = run(holder, Scripted(act), [UNSURE, SURE], deadline_s=0.3, reserve_s=0.1)
    assert [(a.source, a.why, a.prediction.label) for a in answers] == [
        ("device", why, "no"),
        ("device", "sure", "no"),
    ]
    assert seconds < 0.3
    assert counts == {why: 1, "sure": 1}


def test_a_cloud_that_fails_is_left_alone_and_the_budget_with_it(holder: Any) -> None:
    cloud = Scripted(down)
    breaker = BreakerSettings(failures=2, first_s=1000, most_s=1000)
    _, counts = run(holder, cloud, [UNSURE], times=6, breaker=breaker)
    assert counts == {"down": 2, "open": 4}
    assert cloud.batches == [1, 1]


def test_a_device_that_has_no_answer_in_time_says_so_then(holder: Any) -> None:
    with pytest.raises(LateError):
        run(holder, Scripted(), [SURE], deadline_s=0.0)
    with pytest.raises(AbsentError):
        run(Holder(), Scripted(), [SURE])
    with pytest.raises(DataError):
        run(holder, Scripted(), [[1.0, 2.0, 3.0]])
    with pytest.raises(DataError, match="no example"):
        run(holder, Scripted(), np.zeros((0, 2)))


@pytest.mark.parametrize("values", [{"reserve_s": 0.0}, {"deadline_s": 0.01}])
def test_settings_that_leave_no_time_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match="reserve_s"):
        JointSettings(**values)


CARRIED = Routing(
    "confidence", Rule("confidence", 0.4), promise="p", examples=9, shares={0.1: 0.48, 0.5: 0.2}
)


@pytest.mark.parametrize(
    ("evidence", "values", "why"),
    [
        ({}, {}, "uncalibrated"),
        ({"routing": {"measure": "hunch"}}, {}, "uncalibrated"),
        ({"routing": Routing(reason="9 examples are few", shares={0.5: 0.1}).to_json()}, {}, "uncalibrated"),
        (
            {"routing": Routing(reason="9 examples are few", shares={0.5: 0.1}).to_json()},
            {"wanted": Wanted(share=0.6)},
            "asked",
        ),
        ({"routing": CARRIED.to_json()}, {}, "asked"),
        ({"routing": CARRIED.to_json()}, {"wanted": Wanted(share=0.2)}, "sure"),
        ({"routing": CARRIED.to_json()}, {"wanted": Wanted(share=0.05)}, "uncalibrated"),
        ({"routing": CARRIED.to_json()}, {"rule": Rule("confidence", 0.48)}, "sure"),
    ],
    ids=["none", "unreadable", "reason", "reason-share", "promise", "share", "small-share", "override"],
)
def test_the_release_says_when_to_ask_unless_the_device_does(
    evidence: dict[str, Any], values: dict[str, Any], why: str, tools: Any
) -> None:
    """The device's doubt of this example is 0.475."""
    [(answers, _)], counts = run(
        holder_of(tools, **evidence), Scripted(), [UNSURE], **({"rule": None} | values)
    )
    assert ([a.why for a in answers], counts) == ([why], {why: 1})


def test_when_too_many_wait_for_the_cloud_the_device_answers_at_once(holder: Any) -> None:
    async def scenario() -> list[str]:
        go = asyncio.Event()
        joint = Joint(holder, Scripted(lambda: waited(go)), settings(waiting=2))
        x = np.array([UNSURE], np.float32)
        waiting = [asyncio.ensure_future(joint.infer(x)) for _ in range(2)]
        while len(joint._asking) < 2:
            await asyncio.sleep(0.001)
        [third] = await joint.infer(x)
        go.set()
        others = [answers[0].why for answers in await asyncio.gather(*waiting)]
        await joint.close()
        return [third.why, *others]

    async def waited(go: asyncio.Event) -> None:
        await go.wait()

    assert asyncio.run(scenario()) == ["busy", "asked", "asked"]


def test_a_question_holds_no_more_than_fits_and_the_most_doubtful_go(
    holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[0.3, 0.0], [0.1, 0.0], [0.2, 0.0]]
    monkeypatch.setattr("fedge_client.joint.joint.MOST_BYTES", 2 * 8 + 7)  # two examples of eight bytes
    [(answers, _)], counts = run(holder, Scripted(), rows)
    assert [a.why for a in answers] == ["large", "asked", "asked"]
    monkeypatch.setattr("fedge_client.joint.joint.MOST_BYTES", 7)
    [(answers, _)], counts = run(holder, Scripted(), rows)
    assert counts == {"large": 3}


def test_a_release_installed_while_the_cloud_is_asked_changes_nothing_of_that_answer(
    holder: Any, tools: Any
) -> None:
    async def scenario() -> None:
        async def swapped() -> None:
            if not holder.swaps:
                holder.swap(holder_of(tools, version=6).current)

        joint = Joint(holder, Scripted(swapped), settings())
        found = [(await joint.infer(np.array([UNSURE], np.float32)))[0] for _ in range(2)]
        await joint.close()
        assert [(answer.why, answer.version) for answer in found] == [("asked", 5), ("asked", 6)]

    asyncio.run(scenario())
