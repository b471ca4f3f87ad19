"""The queue of messages: answered once, whatever is repeated, on SQLite and PostgreSQL alike."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fedge.errors import FedgeError, RoundError
from fedge_server.registry.database import Registry
from fedge_server.registry.queue import Answer, CloseCount, Queue, Queued

CONTENT = "c" * 64


@pytest.fixture
def queue(registry: Registry) -> Queue:
    for name in ("r", "other"):
        registry.queue_run(name, task="digits", seed=0, config={})
    return registry.queue


@pytest.fixture
def session(queue: Queue) -> str:
    return queue.attach("r")


def message(name: str, session: str, run_id: str = "r", content: str = CONTENT) -> Queued:
    return Queued(
        id=name,
        run_id=run_id,
        session=session,
        device_id="d" * 64,
        node_id=2**63 - 1,
        task="digits",
        task_digest="e" * 64,
        type="train",
        group_id="1",
        content=content,
        created=time.time(),
        deadline=time.time() + 60,
        max_result_bytes=2**40,
    )


def push(queue: Queue, session: str, *names: str, run_id: str = "r") -> list[Queued]:
    messages = [message(name, session, run_id) for name in names]
    queue.push(run_id, session, messages, {CONTENT: b"body"})
    return messages


@pytest.mark.slow
def test_a_message_goes_out_and_its_answer_is_kept(queue: Queue, session: str) -> None:
    sent = push(queue, session, "a", "b")
    assert queue.open_messages() == sent
    assert queue.content(CONTENT) == b"body"
    assert queue.answer([Answer("a", b"\x00\xff", "file")]) == ["accepted"]
    assert queue.open_messages() == sent[1:]
    assert queue.answered("r", session, ["a", "b", "x"]) == [Answer("a", b"\x00\xff", "file", 2**63 - 1)]
    assert queue.answered("r", "older", ["a"]) == []


def test_pushing_again_changes_nothing_even_when_the_message_is_answered(queue: Queue, session: str) -> None:
    sent = push(queue, session, "a", "b")
    queue.answer([Answer("a", b"1")])
    queue.push("r", session, sent, {})  # nor is its content needed again
    push(queue, session, "b", "b", "c")
    assert [m.id for m in queue.open_messages()] == ["b", "c"]
    assert queue.answered("r", session, ["a"])[0].result == b"1"


def test_an_answer_counts_once(queue: Queue, session: str) -> None:
    push(queue, session, "a")
    assert queue.answer([Answer("a", b"1"), Answer("a", b"1")]) == ["accepted", "again"]
    assert queue.answer([Answer("a", b"2", "other")]) == ["again"]
    assert queue.answered("r", session, ["a"])[0] == Answer("a", b"1", "", 2**63 - 1)
    queue.close("r", session, ["a"])
    assert queue.answer([Answer("a", b"1")]) == ["again"]
    assert queue.close("r", session, []) == CloseCount(0, 0, 0)


def test_an_answer_that_many_threads_bring_counts_once(queue: Queue, session: str) -> None:
    push(queue, session, *"abcdefgh")
    batch = [Answer(name, name.encode()) for name in "abcdefgh"]
    with ThreadPoolExecutor(4) as pool:
        outcomes = [outcome for found in pool.map(queue.answer, [batch] * 8) for outcome in found]
    assert (outcomes.count("accepted"), outcomes.count("again")) == (8, 56)


def test_late_answers_are_counted_once_and_dropped(queue: Queue, session: str) -> None:
    push(queue, session, "a", "b", "c")
    queue.answer([Answer("a", b"1")])
    assert queue.close("r", session, ["a", "b", "c"]).late == 0
    assert queue.answer([Answer("b", b"1"), Answer("b", b"1"), Answer("never", b"1")]) == ["late"] * 3
    assert queue.answer([Answer("b\0", b"1"), Answer("b", b"1")]) == ["late", "late"]
    assert queue.answered("r", session, ["a", "b", "c"]) == []
    assert queue.close("r", session, []).late == 1
    assert queue.close("r", session, []).late == 0


def test_messages_past_their_deadline_take_no_answer_but_keep_the_one_they_have(
    queue: Queue, session: str
) -> None:
    push(queue, session, "a", "b")
    queue.answer([Answer("a", b"1")])
    queue.expire(["a", "b"])
    assert queue.open_messages() == []
    assert queue.answer([Answer("a", b"1"), Answer("b", b"1")]) == ["again", "late"]
    assert [answer.message_id for answer in queue.answered("r", session, ["a", "b"])] == ["a"]
    assert queue.close("r", session, ["a", "b"]).late == 1


def test_closing_lets_go_of_contents_that_no_message_needs(queue: Queue, session: str) -> None:
    push(queue, session, "a", "b")
    queue.close("r", session, ["a"])
    assert queue.content(CONTENT) == b"body"
    queue.close("r", session, ["b"])
    with pytest.raises(FedgeError, match="is not there"):
        queue.content(CONTENT)
    push(queue, session, "c")
    assert queue.content(CONTENT) == b"body"


def test_a_content_that_another_run_needs_stays(queue: Queue, session: str) -> None:
    push(queue, session, "a")
    other = queue.attach("other")
    push(queue, other, "b", run_id="other")
    queue.close("r", session, ["a"])
    assert queue.content(CONTENT) == b"body"


def test_traffic_is_told_since_the_last_close(queue: Queue, session: str) -> None:
    queue.traffic("r", 2**40, 1)
    queue.traffic("r", 1, 2)
    assert queue.close("r", session, []) == CloseCount(0, 2**40 + 1, 3)
    assert queue.close("r", session, []) == CloseCount(0, 0, 0)


def test_a_new_session_closes_what_the_earlier_one_waited_for(queue: Queue, session: str) -> None:
    push(queue, session, "a", "b")
    queue.answer([Answer("a", b"1")])
    other = queue.attach("other")
    kept = push(queue, other, "o", run_id="other")
    newer = queue.attach("r")
    assert newer != session
    assert queue.open_messages() == kept
    assert queue.answered("r", session, ["a"]) == []
    assert queue.answer([Answer("a", b"1"), Answer("b", b"1")]) == ["again", "late"]
    with pytest.raises(RoundError, match="a newer worker has taken over"):
        push(queue, session, "c")
    push(queue, newer, "c")
    queue.close("r", session, ["c"])  # nor does an older worker close what the newer one waits for
    assert [m.id for m in queue.open_messages()] == ["o", "c"]


def test_what_does_not_fit_together_is_refused_as_a_whole(queue: Queue, session: str) -> None:
    good = message("a", session)
    for bad, said in (
        (replace(good, id="b", run_id="other"), "is not of session"),
        (replace(good, id="b", session="x"), "is not of session"),
        (replace(good, id="b", content="f" * 64), "was never handed in"),
    ):
        with pytest.raises(RoundError, match=said):
            queue.push("r", session, [good, bad], {CONTENT: b"body"})
    with pytest.raises(RoundError, match="there is none to attach to"):
        queue.attach("nobody")
    with pytest.raises(RoundError, match="is over"):
        queue.push("nobody", "", [], {})
    assert queue.open_messages() == []


def test_a_run_that_is_over_leaves_no_messages(queue: Queue, session: str) -> None:
    push(queue, session, "a", "b")
    queue.forget("r")
    assert queue.open_messages() == []
    assert queue.answer([Answer("a", b"1")]) == ["late"]
    with pytest.raises(RoundError, match="is over"):
        push(queue, session, "a")


def test_remains_of_closed_messages_go_in_time(
    queue: Queue, session: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(queue, session, "answered", "closed")
    queue.answer([Answer("answered", b"1")])
    queue.close("r", session, ["answered", "closed"])
    queue.close("r", session, [])
    assert queue.answer([Answer("answered", b"1"), Answer("closed", b"1")]) == ["late", "late"]
    monkeypatch.setattr("fedge_server.registry.queue.KEPT_S", -120.0)  # the deadline is 60 s ahead
    assert queue.close("r", session, []).late == 1
    assert queue.answer([Answer("closed", b"1")]) == ["late"]
    assert queue.close("r", session, []).late == 0


@pytest.mark.slow
def test_a_thousand_messages_are_a_few_statements(queue: Queue, session: str) -> None:
    names = [f"m{number}" for number in range(6000)]  # more than one statement takes
    push(queue, session, *names)
    assert set(queue.answer([Answer(name, b"x" * 100) for name in names])) == {"accepted"}
    assert len(queue.answered("r", session, names)) == 6000
    queue.close("r", session, names)
    assert queue.open_messages() == []


def test_an_open_queue_survives_its_process(queue: Queue, session: str, registry: Registry) -> None:
    sent = push(queue, session, "a", "b")
    queue.answer([Answer("a", b"1")])
    registry.engine.dispose()
    assert Queue(registry.engine).open_messages() == sent[1:]
    assert Queue(registry.engine).answered("r", session, ["a"])[0].result == b"1"
