from __future__ import annotations

import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Config
from fedge.errors import TimeUpError
from fedge.learning.whole import WholeModel
from fedge_server.compression.choose import source_of
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.shelf import Shelf
from fedge_server.compression.workshop import Workshop
from fedge_server.data import ServerData

FAST = {"distil": {"epochs": 3}, "grid": {"epochs": 2}}
SMALL = Architecture(student="small")


def config(**compress):
    return Config.from_mapping({"compress": FAST | compress})


@pytest.fixture
def made(teacher, digits, helpers, tmp_path):
    """A function that opens a workshop with a shelf in the same root each time."""

    def open_workshop(given=None, network=teacher):
        given = given or config()
        task = helpers.task(small=8)
        data = ServerData(digits.spec, digits.proxy, digits.gate, digits.gate)
        source = source_of(given, task, data, network)
        shelf = Shelf.of(tmp_path, network, task, source.identity(), given)
        return Workshop(network, task, digits.spec, source, given, shelf=shelf), shelf

    return open_workshop


@pytest.mark.slow
def test_a_search_that_goes_on_finds_what_was_made(made):
    workshop, shelf = made()
    graph = workshop.build(Recipe(SMALL, "ternary"))
    again, other = made()
    assert other.folder == shelf.folder
    assert again.build(Recipe(SMALL, "ternary")) == graph
    assert "student-small" not in again.seconds  # nothing was trained
    assert torch.equal(
        again.network(SMALL).state_dict()["0.weight"], workshop.network(SMALL).state_dict()["0.weight"]
    )


@pytest.mark.slow
def test_a_damaged_file_is_made_again(made):
    workshop, shelf = made()
    graph = workshop.build(Recipe(SMALL, "fp32"))
    for path in shelf.folder.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[:-1] if path.suffix == ".safetensors" else data)
    again, _ = made()
    assert again.build(Recipe(SMALL, "fp32")) == graph


def test_another_teacher_seed_or_stage_has_another_shelf_and_another_time_has_not(made, teacher):
    _, shelf = made()
    folders = {shelf.folder}
    with torch.no_grad():
        teacher.network[0].weight[0, 0] += 1
    for given in (config(), replace(config(), seed=1), config(distil={"epochs": 4})):
        folders.add(made(given)[1].folder)
    assert len(folders) == 4
    assert made(config(max_seconds=5.0))[1].folder == made()[1].folder


def test_students_start_from_what_an_earlier_search_taught_them_and_learn_less(
    made, teacher, digits, helpers
):
    workshop, shelf = made(config(distil={"epochs": 30}))
    workshop.network(SMALL)
    os.utime(shelf.folder, (1, 1))
    with torch.no_grad():
        teacher.network[0].weight.mul_(1.001)
    again, _ = made(config(distil={"epochs": 30}))
    began = dict(again.untrained(SMALL).state_dict())
    assert torch.equal(began["0.weight"], workshop.network(SMALL).state_dict()["0.weight"])
    right = helpers.share_right(again.network(SMALL), digits.gate)
    assert right >= helpers.share_right(workshop.network(SMALL), digits.gate) - 0.02
    moved = float((again.network(SMALL).state_dict()["0.weight"] - began["0.weight"]).norm())
    assert moved < 0.5 * float(began["0.weight"].norm())


class _World:
    """A source whose selection data say what they are told to, and that remembers how fast it taught."""

    def __init__(self, *accuracies):
        self._accuracies, self.rates = list(accuracies), []

    def teach(self, student, settings, **_):
        self.rates.append(settings.learning_rate)
        if len(self.rates) > 1 and isinstance(self._accuracies[0], Exception):
            raise self._accuracies[0]
        taught = copy.deepcopy(student)
        with torch.no_grad():
            taught[0].bias += settings.learning_rate
        return taught

    def selection_of(self, _network):
        right = self._accuracies.pop(0)
        return None if right is None else SimpleNamespace(accuracy=right, teacher_accuracy=0.92)


@pytest.mark.parametrize(
    ("accuracies", "rates", "kept"),
    [
        ((0.9, 0.905), (0.03,), 0.03),
        ((0.88, 0.89, 0.9), (0.03, 1.0), 1.0),
        ((0.88, 0.89, 0.895), (0.03, 1.0), 0.03),
        ((0.8, 0.8, 0.9), (0.03, 1.0), 1.0),
        ((None, None), (0.03,), 0.03),
        ((0.8, 0.82, TimeUpError("the time is up")), (0.03, 1.0), 0.03),
    ],
    ids=[
        "the world stays",
        "it has moved",
        "it has moved little",
        "the student is far behind",
        "nobody knows",
        "the time is up",
    ],
)
def test_a_student_goes_on_gently_and_faster_where_the_world_has_moved(
    made, teacher, accuracies, rates, kept
):
    workshop, shelf = made(config(distil={"epochs": 30, "learning_rate": 1.0}))
    workshop.network(SMALL)
    os.utime(shelf.folder, (1, 1))
    with torch.no_grad():
        teacher.network[0].weight.mul_(1.001)
    again, _ = made(config(distil={"epochs": 30, "learning_rate": 1.0}))
    assert again.is_warm(SMALL)
    again._source = world = _World(*accuracies)
    before = again.untrained(SMALL)[0].bias
    moved = again.tried_out(SMALL, 0.5)[0].bias - before
    assert world.rates == pytest.approx(rates)
    assert again.lessons[SMALL.name] > 0
    torch.testing.assert_close(moved, torch.full_like(moved, kept))
    assert again.network(SMALL) is again.tried_out(SMALL, 0.5)


def test_searches_of_another_task_or_of_data_elsewhere_are_no_beginning_and_are_not_tidied_away(
    made, teacher, tmp_path
):
    shelves = []
    for number, data in enumerate(["a", "b", "a", "a"]):
        with torch.no_grad():
            teacher.network[0].bias[0] += 1
        _, shelf = made(replace(config(), data=data))
        shelf.keep_network(data, {"w": np.zeros(2, np.float32)}, 1.0)
        os.utime(shelf.folder, (number, number))
        shelves.append(shelf)
    assert [list(each.before()) for each in shelves] == [["a"], [], ["a"], ["a"]]
    flat = tmp_path / "0123456789abcdef"  # of an earlier fedge
    flat.mkdir()
    (flat / "n.safetensors").write_bytes(b"")
    theirs = tmp_path / "notes"
    theirs.mkdir()
    (theirs / "todo.txt").write_bytes(b"")
    shelves[-1].tidy()
    assert [each.folder.exists() for each in shelves] == [False, True, True, True]
    assert not flat.exists()
    assert (theirs / "todo.txt").exists()


class _Turned(nn.Module):
    """A network that knows the world upright, and sees it turned by a quarter."""

    def __init__(self, upright):
        super().__init__()
        self.upright = upright

    def forward(self, x):
        return self.upright(torch.rot90(x.reshape(-1, 8, 8), -1, (1, 2)).flatten(1))


@pytest.mark.slow
def test_a_student_learns_a_world_that_has_turned_as_a_gentle_lesson_alone_does_not(
    made, teacher, digits, tmp_path, helpers
):
    given = config(distil={"epochs": 60})
    workshop, shelf = made(given)
    workshop.network(SMALL)
    os.utime(shelf.folder, (1, 1))
    proxy, gate = (
        replace(part, x=np.ascontiguousarray(np.rot90(part.x, 1, (1, 2))))
        for part in (digits.proxy, digits.gate)
    )
    turned = WholeModel(teacher.preprocess, _Turned(teacher.network)).eval()
    task, data = helpers.task(small=8), ServerData(digits.spec, proxy, gate, gate)
    source = source_of(given, task, data, turned)
    other = Shelf.of(tmp_path, turned, task, source.identity(), given)
    again = Workshop(turned, task, digits.spec, source, given, shelf=other)
    first = again.untrained(SMALL)
    gentle = again._taught("small", first, again._gently())
    before, slow, learned = (
        helpers.share_right(each, gate) for each in (first, gentle, again.network(SMALL))
    )
    assert before < 0.5
    assert learned > max(slow + 0.1, 0.8)


def test_what_was_learned_in_another_shape_is_no_beginning(made, teacher):
    _, shelf = made()
    shelf.keep_network(SMALL.name, {"w": np.zeros(2, np.float32)}, 1.0)
    os.utime(shelf.folder, (1, 1))
    with torch.no_grad():
        teacher.network[0].weight.mul_(1.001)
    assert not made()[0].is_warm(SMALL)


def test_two_searches_are_kept(made, teacher):
    folders = []
    for number in range(3):
        with torch.no_grad():
            teacher.network[0].bias[0] += 1
        _, shelf = made()
        shelf.keep_network("n", {"w": np.zeros(2, np.float32)}, 1.0)
        os.utime(shelf.folder, (number, number))
        folders.append(shelf.folder)
    shelf.tidy()
    assert [folder.exists() for folder in folders] == [False, True, True]
    assert list(shelf.before()) == ["n"]
