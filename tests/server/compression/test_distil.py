from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Distil
from fedge.errors import CompressionError, ConfigError, TimeUpError
from fedge_server.compression import precision
from fedge_server.compression.distil import _loss, distil, preprocessed

QUICK = Distil(epochs=30, learning_rate=0.01)


@pytest.fixture
def data(digits):
    x = torch.from_numpy(digits.proxy.x).float().flatten(1) / 8 - 1
    return x, torch.from_numpy(digits.proxy.y)


@pytest.fixture
def student(helpers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return helpers.mlp(16)


@pytest.mark.quick_where(mode=("both",))
@pytest.mark.parametrize("mode", ["soft", "hard", "both"])
def test_a_student_learns_in_every_mode(mode, teacher, student, data, digits, helpers):
    before = helpers.share_right(student, digits.gate)
    learned = distil(
        teacher.network, student, *data, Distil(mode=mode, epochs=30, learning_rate=0.01), seed=0
    )
    assert before < 0.3
    assert helpers.share_right(learned, digits.gate) > 0.88


def test_neither_teacher_nor_student_nor_the_global_random_state_is_changed(teacher, student, data, helpers):
    teacher.network.train()
    kept = helpers.weights(teacher), helpers.weights(student), torch.get_rng_state(), torch.get_num_threads()
    distil(teacher.network, student, *data, Distil(epochs=2, augment=("noise:0.1",)), seed=0)
    assert helpers.same(kept[0], helpers.weights(teacher))
    assert helpers.same(kept[1], helpers.weights(student))
    assert teacher.network.training
    assert student.training
    assert torch.equal(kept[2], torch.get_rng_state())
    assert kept[3] == torch.get_num_threads()


def test_the_same_seed_gives_the_same_weights_even_with_dropout(teacher, data, helpers):
    student = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 10))
    settings = Distil(epochs=3, augment=("noise:0.1", "mask:0.1"))
    runs = [helpers.weights(distil(teacher.network, student, *data, settings, seed=s)) for s in (0, 0, 1)]
    assert helpers.same(runs[0], runs[1])
    assert not helpers.same(runs[0], runs[2])


def test_the_soft_loss_is_the_divergence_at_the_temperature_times_its_square():
    # Teacher (ln 4, 0) at T = 2: softened logits (ln 2, 0), so (2/3, 1/3); the student says (1/2, 1/2).
    divergence = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    answers, targets = torch.zeros(1, 2), torch.tensor([[math.log(4), 0.0]])
    y = torch.tensor([0])
    soft = _loss(answers, targets, y, Distil(mode="soft", temperature=2.0))
    both = _loss(answers, targets, y, Distil(mode="both", temperature=2.0, hard_weight=0.25))
    assert soft.item() == pytest.approx(4 * divergence, rel=1e-5)
    assert both.item() == pytest.approx(0.25 * math.log(2) + 0.75 * 4 * divergence, rel=1e-5)


def test_no_batch_of_one_breaks_batch_normalisation(teacher, data):
    student = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    x, y = data
    distil(teacher.network, student, x[:65], y[:65], Distil(epochs=1, batch_size=64), seed=0)


def test_one_example_is_refused(teacher, student, data):
    x, y = data
    with pytest.raises(CompressionError, match="1 examples are too few"):
        distil(teacher.network, student, x[:1], y[:1], QUICK, seed=0)


def test_a_loss_that_is_no_number_is_an_error_and_names_the_learning_rate(teacher, student, data):
    x, y = data
    with pytest.raises(CompressionError, match=r"compress\.distil\.learning_rate"):
        distil(teacher.network, student, x * float("inf"), y, QUICK, seed=0)


def test_an_augmentation_that_does_not_fit_is_the_users_mistake(teacher, student, data):
    with pytest.raises(ConfigError, match=r"compress\.distil\.augment"):
        distil(teacher.network, student, *data, Distil(epochs=1, augment=("flip",)), seed=0)


def test_preprocessing_in_parts_equals_preprocessing_at_once(helpers, digits):
    whole = helpers.Scale()(torch.from_numpy(digits.train.x))
    assert torch.equal(preprocessed(helpers.Scale(), digits.train.x), whole)
    assert np.shape(whole) == (700, 64)


def test_soft_answers_need_no_labels(teacher, student, data, helpers):
    x, y = data
    soft = Distil(mode="soft", epochs=2)
    given, absent = (distil(teacher.network, student, x, labels, soft, seed=0) for labels in (y, None))
    assert helpers.same(helpers.weights(given), helpers.weights(absent))


@pytest.mark.parametrize("mode", ["hard", "both"])
def test_labels_that_a_mode_needs_are_asked_for(mode, teacher, student, data):
    with pytest.raises(CompressionError, match=r"compress\.distil\.mode = '" + mode):
        distil(teacher.network, student, data[0], None, Distil(mode=mode), seed=0)


def test_each_epoch_is_told_with_its_mean_loss(teacher, data):
    told: list[tuple[int, int, float]] = []
    x, y = data
    still = nn.Sequential(nn.Linear(64, 10))
    nn.init.zeros_(still[0].weight)
    nn.init.zeros_(still[0].bias)
    settings = Distil(mode="hard", epochs=3, batch_size=250, learning_rate=1e-9)
    distil(teacher.network, still, x, y, settings, seed=0, tell=lambda *each: told.append(each))
    assert [(epoch, epochs) for epoch, epochs, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert [loss for _, _, loss in told] == pytest.approx([math.log(10)] * 3, rel=1e-4)


@pytest.mark.slow
def test_past_its_deadline_it_raises_and_changes_nothing(teacher, student, data, helpers):
    before, told = helpers.weights(student), []
    with pytest.raises(TimeUpError, match="epoch 1 of 30"):
        distil(teacher.network, student, *data, QUICK, seed=0, deadline=time.monotonic() - 1)

    def slow(epoch: int, _epochs: int, _loss: float) -> None:
        told.append(epoch)
        while time.monotonic() <= deadline:
            pass

    deadline = time.monotonic() + 0.3
    with pytest.raises(TimeUpError, match="epoch 2 of 30"):
        distil(teacher.network, student, *data, QUICK, seed=0, deadline=deadline, tell=slow)
    assert told == [1]
    assert helpers.same(before, helpers.weights(student))


def test_zeros_that_are_to_be_kept_stay_and_all_else_learns(teacher, student, data):
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        student[0].weight[mask] = 0.0
        student[0].bias.zero_()  # of one dimension: not a weight that was pruned
    learned = distil(teacher.network, student, *data, Distil(epochs=3), seed=0, keep_zeros=True)
    assert (learned[0].weight[mask] == 0).all()
    assert (learned[0].weight[~mask] != student[0].weight[~mask]).float().mean() > 0.9
    assert (learned[0].bias != 0).any()
    free = distil(teacher.network, student, *data, Distil(epochs=3), seed=0)
    assert (free[0].weight[mask] != 0).any()


def test_bfloat16_is_chosen_where_convolutions_are_large_and_the_processor_has_it(monkeypatch, helpers):
    large = nn.Sequential(nn.Conv2d(1, 64, 5), nn.Flatten(), nn.Linear(64 * 576, 10))
    for has in (False, True):
        monkeypatch.setattr(precision, "has_bf16", lambda has=has: has)
        assert precision.numbers_for("auto", large, 64).bf16 is has
        assert not precision.numbers_for("auto", large, 1).bf16
        assert not precision.numbers_for("auto", helpers.mlp(2000), 64).bf16
        assert precision.numbers_for("bf16", helpers.mlp(4), 1).bf16
        assert not precision.numbers_for("fp32", large, 64).bf16


@pytest.mark.slow
def test_a_student_trained_in_bfloat16_is_as_good_and_is_float32(teacher, data, digits, helpers):
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x.reshape(-1, 1, 8, 8))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Images()
    scores = []
    for name in ("fp32", "bf16"):
        settings = Distil(epochs=15, learning_rate=0.01, precision=name)
        learned = distil(teacher.network, student, *data, settings, seed=0)
        assert all(p.dtype == torch.float32 and p.is_contiguous() for p in learned.parameters())
        scores.append(helpers.share_right(learned, digits.gate))
    assert scores[0] > 0.93
    assert scores[1] == pytest.approx(scores[0], abs=0.015)
