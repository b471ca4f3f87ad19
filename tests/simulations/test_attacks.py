"""Training data comes out of an update as it is, and does not out of one that is protected.

Fixed seeds, so each score is one number. The margins: over 24 victims the correlation of an image made of
noise has a spread of at most 0.2, so its mean has a standard error of 0.04; 4 of these are 0.16. The best of
200 units has a spread of 0.06, so a difference of two means has an error of 0.017; 4 of these are 0.07.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from fedge.dataset import Dataset
from fedge.secagg.encoding import Encoding
from fedge.statistics import Moments
from fedge.task import Source
from fedge.tasks.digits import TASK
from fedge_simulations.attacks import (
    Federation,
    Matching,
    analytic,
    candidates,
    correlation,
    inferred_label,
    matching,
    psnr,
    views,
)
from fedge_simulations.attacks.inversion import Gradients, leading

VICTIMS = 24
NOISE_MARGIN, UNITS_MARGIN = 0.16, 0.07


@dataclass(frozen=True)
class Attacked:
    data: Dataset
    federation: Federation
    positions: np.ndarray
    seen: list[Gradients]

    def mean(self, found: Callable[[int], np.ndarray]) -> float:
        return float(np.mean([correlation(found(j), self.data.x[i]) for j, i in enumerate(self.positions)]))

    def best_unit(self, gradients: Gradients, j: int) -> np.ndarray:
        found = candidates(gradients["1.weight"], gradients["1.bias"])
        return max(found, key=lambda image: correlation(image, self.data.x[self.positions[j]]))


@pytest.fixture(scope="module")
def attacked() -> Attacked:
    data = TASK.read(Source())
    federation = Federation.of(TASK, data.spec, moments=Moments.of(data.x, data.spec))
    positions = np.random.default_rng(0).permutation(len(data))[:VICTIMS]
    return Attacked(data, federation, positions, [_seen(federation, data, i) for i in positions])


def _seen(federation: Federation, data: Dataset, *positions: int) -> Gradients:
    return federation.gradients_of(federation.update_of(data.examples.take(np.array(positions))))


def _formula(gradients: Gradients) -> np.ndarray:
    return analytic(gradients["1.weight"], gradients["1.bias"])


def _direction(gradients: Gradients) -> np.ndarray:
    found = leading(gradients["1.weight"])
    return found * np.sign(gradients["1.bias"] @ (gradients["1.weight"] @ found))


@pytest.mark.parametrize(
    "view", [lambda gradients: gradients, views.int8], ids=["as it is", "as 8-bit numbers"]
)
@pytest.mark.parametrize("attack", [_formula, _direction])
def test_an_update_gives_its_single_example_back(
    attacked: Attacked,
    view: Callable[[Gradients], Gradients],
    attack: Callable[[Gradients], np.ndarray],
) -> None:
    for j, i in enumerate(attacked.positions):
        assert correlation(attack(view(attacked.seen[j])), attacked.data.x[i]) > 0.99


def test_the_reconstruction_is_the_raw_image_pixel_by_pixel(attacked: Attacked) -> None:
    found = attacked.federation.raw(_formula(attacked.seen[0]).reshape(1, 1, 8, 8)).reshape(8, 8)
    np.testing.assert_allclose(found, attacked.data.x[attacked.positions[0]], atol=0.01)


@pytest.mark.parametrize("changes", [{"update": "gradient"}, {"epochs": 5}], ids=["fedsgd", "five steps"])
def test_neither_fedsgd_nor_more_local_steps_hide_it(attacked: Attacked, changes: dict[str, object]) -> None:
    data = attacked.data
    federation = Federation.of(TASK, data.spec, moments=Moments.of(data.x, data.spec), **changes)
    for i in attacked.positions[:4]:
        assert correlation(_formula(_seen(federation, data, i)), data.x[i]) > 0.99


def test_of_eight_examples_some_unit_shows_one_alone(attacked: Attacked) -> None:
    data = attacked.data
    gradients = _seen(attacked.federation, data, *attacked.positions[:8])
    assert correlation(attacked.best_unit(gradients, 0), data.x[attacked.positions[0]]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "protect",
    [
        lambda gradients, seed: views.noised(gradients, clip=1.0, sigma=1.0, seed=seed),
        lambda gradients, seed: views.masked(gradients, seed=seed),
    ],
    ids=["clip 1 and noise 1", "masked"],
)
def test_a_protected_update_shows_no_more_than_one_without_the_victim(
    attacked: Attacked, protect: Callable[[Gradients, int], Gradients]
) -> None:
    others = attacked.seen[1:] + attacked.seen[:1]
    seen = [protect(gradients, j) for j, gradients in enumerate(attacked.seen)]
    without = [protect(gradients, 1000 + j) for j, gradients in enumerate(others)]
    mean_image = attacked.mean(lambda _: attacked.data.x.mean(0))
    for attack in (_formula, _direction):
        assert abs(attacked.mean(lambda j, attack=attack: attack(seen[j]))) < NOISE_MARGIN < mean_image
    best = attacked.mean(lambda j: attacked.best_unit(seen[j], j))
    unrelated = attacked.mean(lambda j: attacked.best_unit(without[j], j))
    assert best - unrelated < UNITS_MARGIN
    assert best < mean_image


def test_a_hundredth_of_the_clip_is_too_little_noise(attacked: Attacked) -> None:
    seen = [views.noised(g, clip=1.0, sigma=0.01, seed=j) for j, g in enumerate(attacked.seen)]
    assert attacked.mean(lambda j: _direction(seen[j])) > 0.9


def test_a_sum_of_few_clients_still_shows_single_examples(attacked: Attacked) -> None:
    seen, without = views.summed(attacked.seen[:10]), views.summed(attacked.seen[10:20])
    first = attacked.data.x[attacked.positions[0]]
    assert correlation(attacked.best_unit(seen, 0), first) > 0.99
    assert correlation(attacked.best_unit(without, 0), first) < 0.9


@pytest.mark.slow
def test_a_convolutional_network_gives_digits_back_to_an_optimiser(attacked: Attacked) -> None:
    data, moments = attacked.data, Moments.of(attacked.data.x, attacked.data.spec)
    federation = Federation.of(TASK, data.spec, model="cnn", moments=moments)
    bounds = tuple(float((value - moments.mean[0]) / moments.std[0]) for value in (0.0, 16.0))
    settings = Matching(bounds=bounds)
    plain, masked = [], []
    for j, i in enumerate(attacked.positions[:4]):
        gradients = _seen(federation, data, i)
        label = inferred_label(gradients["9.bias"])
        assert label == data.y[i]
        for view, scores in ((gradients, plain), (views.masked(gradients, seed=j), masked)):
            found = matching(federation.network(), view, [label], (1, 8, 8), settings=settings, seed=j)
            scores.append(correlation(found, data.x[i]))
    assert np.mean(plain) > 0.9
    assert np.mean(masked) < np.mean([correlation(data.x.mean(0), data.x[i]) for i in attacked.positions[:4]])


def test_scores_worked_by_hand() -> None:
    victim = np.array([0.0, 4.0, 8.0, 4.0])
    assert correlation(3 * victim + 1, victim) == pytest.approx(1.0)
    assert correlation(-victim, victim) == pytest.approx(-1.0)
    assert correlation(np.ones(4), victim) == 0.0
    assert psnr(victim + np.array([0, 0, 0, 2.0]), victim, 10.0) == pytest.approx(20.0)  # 100 over 1


def test_a_mask_that_is_taken_off_leaves_the_update() -> None:
    value = {"w": np.array([[0.5, -1.25], [3.0, 0.0]]), "b": np.array([7.0])}
    nothing = views.masked({name: np.zeros_like(v) for name, v in value.items()}, seed=3)
    turn = 2**32 * Encoding(views.RANGE, 1, views.COHORT).step
    for name, wanted in value.items():
        found = (views.masked(value, seed=3)[name] - nothing[name] + turn / 2) % turn - turn / 2
        np.testing.assert_allclose(found, np.clip(wanted, -4, 4), atol=1e-6)
