"""What a lesson is, its loss by hand and by another formula, and a whole step of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Train
from fedge.learning import local, objective
from fedge.learning.lessons import answered, softened
from fedge.learning.terms import Lesson, Terms

LESSON = Lesson("mlp", "d" * 64, temperature=2.0, hard_weight=0.25, keep=False)


def test_the_softened_loss_worked_by_hand():
    # Teacher (0, ln 9) at T = 2: odds 3, so (.25, .75); student (0, 0): (.5, .5).
    # 4 * (.25 ln .5 + .75 ln 1.5) = 4 * .130812
    found = softened(torch.zeros(1, 2), torch.tensor([[0.0, math.log(9)]]), 2.0)
    assert found.item() == pytest.approx(4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)), rel=1e-6)


def test_a_lessons_loss_mixes_labels_and_answers_as_the_formula_says():
    rng = np.random.default_rng(0)
    student, teacher, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.integers(0, 4, 5)
    targets = torch.from_numpy(np.column_stack([y, teacher]))
    found = objective.losses(Train(), LESSON)(torch.from_numpy(student), targets).numpy()

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    p, q = softmax(teacher / 2), softmax(student / 2)
    soft = 4 * (p * np.log(p / q)).sum(1)
    hard = -np.log(softmax(student)[np.arange(5), y])
    np.testing.assert_allclose(found, 0.25 * hard + 0.75 * soft, rtol=1e-12)


def test_where_the_teacher_is_wrong_the_label_alone_counts():
    rng = np.random.default_rng(1)
    student, teacher, y = rng.normal(size=(40, 4)), rng.normal(size=(40, 4)), rng.integers(0, 4, 40)
    targets = torch.from_numpy(np.column_stack([y, teacher]))
    plain, always, right = (
        objective.losses(Train(), lesson)(torch.from_numpy(student), truth).numpy()
        for lesson, truth in (
            (None, torch.from_numpy(y)),
            (LESSON, targets),
            (replace(LESSON, where_right=True), targets),
        )
    )
    is_right = teacher.argmax(1) == y
    assert 0 < is_right.sum() < 40
    np.testing.assert_allclose(right, np.where(is_right, always, plain), rtol=1e-12)


def test_a_step_of_a_lesson_goes_down_its_gradient():
    torch.manual_seed(0)
    model, teacher = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    w, b = model.weight.detach().clone().requires_grad_(), model.bias.detach().clone().requires_grad_()
    p = ((x @ teacher.weight.T + teacher.bias) / 2).softmax(1).detach()
    log_q = ((x @ w.T + b) / 2).log_softmax(1)
    hard = -(x @ w.T + b).log_softmax(1)[torch.arange(6), y]
    loss = (0.25 * hard + 0.75 * 4 * (p * (p.log() - log_q)).sum(1)).mean()
    loss.backward()
    settings = Train(epochs=1, batch_size=6, learning_rate=0.1, momentum=0.0)
    found = local.train(model, x, answered(teacher, x, y), settings, seed=0, lesson=LESSON)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(model.weight, w.detach() - 0.1 * w.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.bias, b.detach() - 0.1 * b.grad, rtol=1e-12, atol=1e-14)


def test_a_teacher_who_answers_each_altered_batch_is_the_same_where_nothing_is_altered():
    torch.manual_seed(0)
    first, teacher = nn.Linear(3, 2), nn.Linear(3, 2).eval()
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    ends = []
    for truth, asked in ((answered(teacher, x, y), None), (y, teacher)):
        model = nn.Linear(3, 2)
        model.load_state_dict(first.state_dict())
        local.train(model, x, truth, Train(batch_size=4), seed=1, lesson=LESSON, teacher=asked)
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)


def test_what_a_strategy_says_of_a_lesson_a_client_reads():
    for lesson in (LESSON, replace(LESSON, where_right=True)):
        terms = Terms(lesson=lesson)
        assert Terms.of(terms.said()) == terms
    assert "lesson-where-right" not in Terms(lesson=LESSON).said()  # as devices of before know it
    assert not terms.keeps
    assert Terms.of({}).lesson is None


@pytest.mark.parametrize(
    "changes",
    [
        {"lesson-model": 3},
        {"lesson-digest": None},
        {"lesson-temperature": "hot"},
        {"lesson-temperature": 0.0},
        {"lesson-temperature": float("nan")},
        {"lesson-hard-weight": 1.0},
        {"lesson-hard-weight": True},
    ],
)
def test_a_lesson_that_is_none_is_refused(changes):
    with pytest.raises(ValueError, match="lesson"):
        Terms.of({**Terms(lesson=LESSON).said(), **changes})
