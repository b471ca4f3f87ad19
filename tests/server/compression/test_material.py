from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedge.config import Distil
from fedge_server.compression.material import Material

SETTINGS = Distil(augment=("noise:0.1",), views=3, epochs=6, batch_size=8)


@pytest.fixture
def inputs():
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


def counting():
    """A teacher that notes how many inputs it has answered."""
    network = nn.Linear(4, 3).eval()
    asked: list[int] = []
    network.register_forward_hook(lambda _module, given, _answer: asked.append(len(given[0])))
    return network, asked


def student():
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def test_a_teacher_answers_each_view_once_for_all_students(inputs):
    teacher, asked = counting()
    material = Material.of(teacher, *inputs, SETTINGS, seed=0)
    assert material.altered.shape == (3, 20, 4)
    assert torch.equal(material.altered[0], inputs[0])
    assert not torch.equal(material.altered[1], material.altered[2])
    for _ in range(2):
        material.teach(student(), SETTINGS, seed=0)
    assert sum(asked) == 3 * 20
    torch.testing.assert_close(material.answers, teacher(material.altered))


def test_views_are_decided_by_the_seed(inputs):
    one, again, other = (Material.of(counting()[0], *inputs, SETTINGS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.altered, again.altered)
    assert not torch.equal(one.altered, other.altered)


def test_without_views_the_teacher_is_asked_anew_and_without_augmentation_once(inputs):
    teacher, asked = counting()
    anew = replace(SETTINGS, views=0)
    Material.of(teacher, *inputs, anew, seed=0).teach(student(), anew, seed=0)
    assert sum(asked) == 6 * 20
    asked.clear()
    plain = replace(SETTINGS, augment=())
    material = Material.of(teacher, *inputs, plain, seed=0)
    material.teach(student(), plain, seed=0)
    assert sum(asked) == 20


@pytest.mark.slow
def test_students_learn_without_labels(inputs):
    x, _ = inputs
    soft = replace(SETTINGS, mode="soft", epochs=200, augment=(), learning_rate=0.05)
    teacher, _ = counting()
    taught = Material.of(teacher, x, None, soft, seed=0).teach(student(), soft, seed=0)
    assert (taught(x).argmax(1) == teacher(x).argmax(1)).float().mean() > 0.9
