from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedge.config import Distil
from fedge.errors import CompressionError
from fedge.learning.models import Recurrent, gru
from fedge.spec import Spec
from fedge_server.compression.distil import distil, logits, preprocessed
from fedge_server.compression.layers import Tap, last_layer
from fedge_server.compression.precision import numbers_for
from fedge_server.compression.teachers import Hints, Teachers, pooled

QUICK = Distil(epochs=5, learning_rate=0.01)
FP32 = numbers_for("fp32", nn.Identity(), 1)


@pytest.fixture
def data(teacher, digits):
    return preprocessed(teacher.preprocess, digits.proxy.x), torch.from_numpy(digits.proxy.y)


@pytest.fixture
def student(helpers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return helpers.mlp(16)


def test_an_ensemble_answers_with_the_mean_of_its_softened_probabilities():
    # At T = 2 the logits (ln 16, 0) are (4/5, 1/5) and (0, ln 81) are (1/10, 9/10): together (9/20, 11/20).
    one, two = torch.tensor([[math.log(16), 0.0]]), torch.tensor([[0.0, math.log(81)]])
    answers = pooled([one, two], temperature=2.0)
    assert torch.softmax(answers / 2.0, dim=1).tolist() == [pytest.approx([0.45, 0.55])]
    assert pooled([one], temperature=2.0) is one


def test_one_network_in_a_sequence_teaches_as_it_does_alone(teacher, student, data, helpers):
    alone = distil(teacher.network, student, *data, QUICK, seed=0)
    listed = distil([teacher.network], student, *data, QUICK, seed=0)
    assert helpers.same(helpers.weights(alone), helpers.weights(listed))


@pytest.mark.slow
def test_a_student_of_weak_teachers_comes_near_to_what_they_know_together(student, data, digits, helpers):
    x, y = data
    weak = [
        distil(torch.zeros(40, 10), helpers.mlp(16), x[part], y[part], Distil(mode="hard", epochs=40), seed=0)
        for part in torch.arange(320).split(40)
    ]
    single = sum(helpers.share_right(network, digits.gate) for network in weak) / len(weak)
    together = Distil(mode="soft", epochs=60, learning_rate=0.01, temperature=2.0)
    learned = distil(weak, student, x, None, together, seed=0)
    assert helpers.share_right(learned, digits.gate) > single + 0.03


def test_no_teacher_at_all_is_refused(student, data):
    with pytest.raises(CompressionError, match="no teacher"):
        distil([], student, *data, QUICK, seed=0)


def test_the_last_layer_is_the_one_that_runs_last_whatever_the_order_of_construction():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.body = nn.Linear(3, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(torch.relu(self.body(x))))

    network = Odd().train()
    state = torch.get_rng_state()
    assert last_layer(network, torch.ones(2, 3)) is network.head
    assert network.training
    assert network.drop.training
    assert torch.equal(state, torch.get_rng_state())


def test_a_tap_gives_what_the_last_layer_is_given_and_averages_positions():
    x = torch.arange(2.0 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    convolution = nn.Conv2d(3, 5, 1)
    tap = Tap(convolution, x)
    convolution(x)
    assert torch.equal(tap.take(), x.mean((2, 3)))
    linear = nn.Linear(3, 5)
    steps = torch.randn(2, 7, 3)
    tap = Tap(linear, steps)
    linear(steps)
    assert torch.allclose(tap.take(), steps.mean(1))
    tap.close()
    assert not linear._forward_pre_hooks


def test_hints_are_the_squared_difference_in_the_teachers_variance(helpers):
    x = torch.randn(64, 64)
    teacher, student = helpers.mlp(8), helpers.mlp(4)
    teachers = Teachers([teacher, teacher], 1.0, FP32, example=x[:2], taps=True)
    hints = Hints(student, teachers, x)
    _, hidden = teachers.teach(x)
    own = teacher[:4](x)
    assert torch.allclose(hidden, torch.cat([own, own], 1))  # what goes into the last of two teachers' layers
    assert hints.regressor.weight.shape == (16, 4)
    student(x)
    predicted = student[:4](x) @ hints.regressor.weight.T + hints.regressor.bias
    variance = ((hidden - hidden.mean(0)) ** 2).mean()
    wanted = ((predicted - hidden) ** 2).mean() / variance
    assert hints.loss(hidden).item() == pytest.approx(wanted.item(), rel=1e-5)


def explained(student: nn.Module, teacher: nn.Module, x: torch.Tensor) -> float:
    """Share of the teacher's hidden variance that a line through the student's hidden values explains."""
    with torch.no_grad():
        inputs = torch.cat([student[:4](x), torch.ones(len(x), 1)], 1).double()
        wanted = teacher[:4](x).double()
    rest = wanted - inputs @ torch.linalg.lstsq(inputs, wanted, driver="gelsd").solution
    return float(1 - rest.square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.slow
def test_hints_bring_the_hidden_layers_together_and_leave_nothing_behind(student, data, helpers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        teacher = helpers.mlp(64)  # knows nothing: what learns classes does not come near it by itself
    settings = replace(QUICK, epochs=60, mode="hard")
    plain = distil(teacher, student, *data, settings, seed=0)
    hinted = distil(teacher, student, *data, replace(settings, hint_weight=10.0), seed=0)
    x = data[0]
    assert explained(hinted, teacher, x) > explained(plain, teacher, x) + 0.05
    assert list(hinted.state_dict()) == list(student.state_dict())
    assert not any(module._forward_pre_hooks for module in hinted.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [QUICK, replace(QUICK, augment=("noise:0.1",)), replace(QUICK, mode="hard")]
)
def test_hints_change_no_argument_and_repeat_themselves(settings, teacher, student, data, helpers):
    hinted = replace(settings, hint_weight=1.0)
    kept = helpers.weights(teacher), helpers.weights(student), torch.get_rng_state()
    runs = [helpers.weights(distil(teacher.network, student, *data, hinted, seed=0)) for _ in range(2)]
    assert helpers.same(*runs)
    assert helpers.same(kept[0], helpers.weights(teacher))
    assert helpers.same(kept[1], helpers.weights(student))
    assert torch.equal(kept[2], torch.get_rng_state())
    assert not helpers.same(
        runs[0], helpers.weights(distil(teacher.network, student, *data, settings, seed=0))
    )


def test_hints_reach_recurrent_networks(helpers):
    spec = Spec("signal", (6, 2), "float32", ("a", "b"))
    x = torch.randn(12, 2, 6)
    teacher, student = gru(8)(spec), gru(4)(spec)
    assert isinstance(student, Recurrent)
    learned = distil(
        teacher, student, x, None, Distil(mode="soft", epochs=1, batch_size=4, hint_weight=0.5), seed=0
    )
    assert learned(x).shape == (12, 2)


def test_hints_of_answers_alone_are_refused(teacher, student, data):
    answers = logits(teacher.network, data[0])
    with pytest.raises(CompressionError, match="hint_weight"):
        distil(answers, student, *data, replace(QUICK, hint_weight=1.0), seed=0)
