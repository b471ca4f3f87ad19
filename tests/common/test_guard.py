"""What a client does to its own update: numbers by hand, and gradients of single examples beside torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedge.config import Train
from fedge.errors import DataError
from fedge.learning import dpsgd, objective
from fedge.learning.dpsgd import Plan, train_privately
from fedge.learning.guard import Guard, guarded, noised_share
from fedge.noise import derived_key

KEY = derived_key("test")
NEARLY_NONE = 1e-6


def test_an_update_is_cut_over_all_its_arrays_and_keeps_dtype_and_shape():
    reference = {"w": np.array([[1.0, 2.0]], np.float32), "b": np.array([3.0], np.float32)}
    arrays = {"w": np.array([[4.0, 2.0]], np.float32), "b": np.array([7.0], np.float32)}  # change (3, 0 | 4)
    found = guarded(arrays, reference, Guard("local", 1.0, NEARLY_NONE), KEY)
    np.testing.assert_allclose(found["w"], [[1.6, 2.0]], atol=1e-5)
    np.testing.assert_allclose(found["b"], [3.8], atol=1e-5)
    assert [(v.dtype, v.shape) for v in found.values()] == [(np.float32, (1, 2)), (np.float32, (1,))]


def test_the_noise_of_a_device_has_the_whole_deviation():
    nothing = {"w": np.zeros(40_000, np.float64)}
    found = guarded(nothing, nothing, Guard("local", 2.0, 1.5), KEY)["w"]
    assert found.std() == pytest.approx(3.0, rel=0.02)
    other = guarded(nothing, nothing, Guard("local", 2.0, 1.5), derived_key("other"))["w"]
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.02


def test_shares_of_noise_add_up_to_the_whole_when_as_many_drop_out_as_may():
    """10 clients, of which a sum needs 4: with 4 the deviation is z S = 3, with 10 sqrt(10 / 4) as much."""
    nothing, step = {"w": np.zeros(20_000)}, 2.0**-12
    shares = [
        noised_share(nothing, nothing, Guard("local", 2.0, 1.5), derived_key(k), least=4, step=step)["w"]
        for k in range(10)
    ]
    assert {share.dtype for share in shares} == {np.dtype(np.int64)}
    assert (sum(shares[:4]) * step).std() == pytest.approx(3.0, rel=0.02)
    assert (sum(shares) * step).std() == pytest.approx(3.0 * (10 / 4) ** 0.5, rel=0.02)


def test_shares_carry_the_clipped_changes_and_a_grid_too_coarse_is_refused():
    reference, arrays = {"w": np.array([1.0, 2.0])}, {"w": np.array([4.0, 6.0])}  # change (3, 4): cut to 1
    quiet = Guard("local", 1.0, 0.01)
    found = noised_share(arrays, reference, quiet, KEY, least=1, step=2.0**-14)["w"]
    np.testing.assert_allclose(found * 2.0**-14, [0.6, 0.8], atol=0.06)
    with pytest.raises(ValueError, match="64 steps"):
        noised_share(arrays, reference, quiet, KEY, least=4, step=2.0**-12)


def test_the_plan_looks_at_each_example_once_in_a_pass_on_average():
    plan = Plan.of(100, Train(batch_size=32, epochs=3))  # 4 batches
    assert (plan.sampling, plan.steps) == (0.25, 12)
    assert Plan.of(5, Train(batch_size=32, epochs=2)) == Plan(1.0, 2)


class Linear(nn.Module):
    """Logits x w^T: the gradient of an example is (p - onehot(y)) x."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)


def train(model, x, y, guard, *, settings=None, secret=KEY):
    settings = settings or Train(momentum=0.0)
    seen = []

    def step(gradients):
        seen.append({name: value.clone() for name, value in gradients.items()})

    train_privately(
        model, x, y, settings, guard, loss_of=objective.losses(settings), step=step, seed=0, secret=secret
    )
    return seen


def test_each_examples_gradient_is_cut_by_itself():
    # p = (.5, .5). Example (3, 4), class 0: rows -.5 x and .5 x, norm .5 * 5 * sqrt 2 = 3.536: cut to 1.
    # Example (.1, 0), class 1: norm .0707, stays: rows .05, -.05.
    x, y = torch.tensor([[3.0, 4.0], [0.1, 0.0]]), torch.tensor([0, 1])
    (found,) = train(Linear(), x, y, Guard("example", 1.0, NEARLY_NONE))
    first = np.array([[-1.5, -2.0], [1.5, 2.0]]) / 3.5355
    second = np.array([[0.05, 0.0], [-0.05, 0.0]])
    np.testing.assert_allclose(found["layer.weight"], (first + second) / 2, atol=1e-4)


def test_one_example_moves_the_sum_by_the_clipping_norm_at_most():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 2, generator=rng) * 100, torch.randint(0, 2, (9,), generator=rng)
    gradients = dpsgd._Gradients(Linear(), objective.losses(Train()))
    grid = 2.0**-20
    whole = gradients.clipped_sum(x, y, 1.0, grid)["layer.weight"] * grid
    for left_out in range(9):
        rest = [i for i in range(9) if i != left_out]
        without = gradients.clipped_sum(x[rest], y[rest], 1.0, grid)["layer.weight"] * grid
        assert 0 < float((whole - without).norm()) <= 1.0


def test_noise_is_on_the_sum_and_divided_by_the_number_expected():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 200, bias=False))
    x, y = torch.zeros(8, 100), torch.zeros(8, dtype=torch.int64)  # inputs of 0: gradients of 0
    found = train(model, x, y, Guard("example", 2.0, 3.0, 8), settings=Train(batch_size=2, momentum=0.0))
    assert len(found) == 4
    for each in found:
        assert float(each["1.weight"].std()) == pytest.approx(6.0 / 2, rel=0.02)  # z C / B
    assert not torch.equal(found[0]["1.weight"], found[1]["1.weight"])


def test_batches_are_poisson_and_the_secret_decides_them():
    """The gradient of the only weight counts who was in the batch."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    x, y = torch.ones(400, 1), torch.zeros(400, dtype=torch.int64)  # each gradient (-.5, .5), norm .707

    def sizes(secret):
        guard = Guard("example", 1.0, NEARLY_NONE, 400)
        found = train(model, x, y, guard, settings=Train(batch_size=40, momentum=0.0), secret=secret)
        return [round(float(each["weight"][1, 0]) / 0.5 * 40) for each in found]

    found = sizes(KEY)
    assert len(found) == 10
    assert len(set(found)) > 3  # mean 40, deviation 6
    assert all(15 <= size <= 65 for size in found)
    assert found == sizes(KEY) != sizes(derived_key("other"))


def recurrent():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.out = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.out(self.gru(x)[0][:, -1])

    return Last(), (6, 3)


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)), (1, 6, 6)


@pytest.mark.parametrize("make", [recurrent, convolutional])
def test_gradients_of_single_examples_are_those_of_torch_one_by_one(make):
    torch.manual_seed(0)
    model, shape = make()
    x, y = torch.randn(7, *shape), torch.randint(0, 4, (7,))
    loss_of = objective.losses(Train())
    found = dpsgd._Gradients(model, loss_of).clipped_sum(x, y, 1e6, 2.0**-30)
    model.zero_grad()
    loss_of(model(x), y).sum().backward()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(found[name] * 2.0**-30, parameter.grad, atol=1e-5)


def test_every_device_makes_the_same_steps_whatever_it_holds():
    """Its epsilon is that of the plan: not of its size, which would need the worst of all sizes."""
    guard, settings = Guard("example", 1.0, NEARLY_NONE, 20), Train(batch_size=5, momentum=0.0, epochs=2)
    for size in (20, 21, 90):
        x, y = torch.ones(size, 2), torch.zeros(size, dtype=torch.int64)
        found = train(Linear(), x, y, guard, settings=settings)
        assert len(found) == 8
        # Each gradient has rows (-.5, -.5) and (.5, .5), norm 1; on average a quarter, over a quarter.
        mean = np.mean([float(each["layer.weight"][1, 0]) for each in found])
        assert mean == pytest.approx(0.5, abs=0.25)


def test_a_device_with_too_few_examples_takes_no_part():
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="3 examples, but the run takes clients with 4 or more"):
        train(Linear(), x, y, Guard("example", 1.0, 1.0, min_examples=4))
