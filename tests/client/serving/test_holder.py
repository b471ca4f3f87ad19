from __future__ import annotations

import threading

import pytest

from fedge.errors import AbsentError
from fedge_client.serving.holder import Holder


def test_an_empty_holder_says_that_nothing_is_installed() -> None:
    with pytest.raises(AbsentError, match="no model is installed"), Holder[str]().lease():
        pass


def test_the_old_model_is_closed_after_its_last_request_and_only_once() -> None:
    closed: list[str] = []
    holder = Holder("old", closed.append)
    with holder.lease() as first:
        with holder.lease():
            holder.swap("new")
            with holder.lease() as second:
                assert (first, second, closed) == ("old", "new", [])
        assert closed == []
    assert closed == ["old"]
    holder.swap("newest")
    assert (closed, holder.current, holder.swaps) == (["old", "new"], "newest", 2)


def test_no_request_ever_gets_a_closed_model_while_two_threads_swap() -> None:
    closed: set[int] = set()
    holder = Holder(0, closed.add)
    faults: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with holder.lease() as model:
                if model in closed:
                    faults.append(model)

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for thread in askers:
        thread.start()
    for i in range(1, 1001):
        holder.swap(i)
    stop.set()
    for thread in askers:
        thread.join()
    assert faults == []
    assert closed == set(range(1000))
