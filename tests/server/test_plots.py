"""Pictures of populations: how many clients are looked at, and which picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedge.dataset import Dataset
from fedge.spec import Spec
from fedge_server.plots import Holdings, holdings


class Counted(Sequence[Any]):
    """A lazy population that counts which clients are asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, set[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: Any) -> Any:
        self.asked.add(i)
        return np.arange(1 + i % 7)


def held(clients: Sequence[Any]) -> Holdings:
    spec = Spec("image", (2, 2), "uint8", ("a", "b"))
    dataset = Dataset(spec, np.zeros((8, 2, 2), np.uint8), np.arange(8) % 2)
    return Holdings(dataset, clients, ())


@pytest.mark.slow
def test_of_a_million_clients_a_thousand_are_looked_at() -> None:
    clients = Counted(1_000_000)
    sizes, skew = holdings(held(clients))
    assert len(clients.asked) == 1000
    assert max(clients.asked) > 990_000
    assert sizes.caption == "1,000 of 1,000,000 clients: 1 to 7 examples, median 4."
    assert "<svg" in skew.svg


def test_few_clients_are_shown_one_by_one() -> None:
    (each,) = holdings(Holdings(held(()).dataset, [np.arange(3)] * 5, list("abcde")))
    assert each.title == "Who holds what"
