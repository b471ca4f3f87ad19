"""The test of signs: exact by enumeration, and right at its level for devices that differ."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fedge_server.drift.permutation import paired


def test_the_p_is_that_of_all_sign_patterns() -> None:
    differences = np.random.default_rng(3).normal(0.5, 1, (6, 3, 2))
    scale = np.sqrt((differences**2).sum((0, 2)))

    def statistics(signs: tuple[int, ...]) -> np.ndarray:
        mean = sum(sign * d for sign, d in zip(signs, differences, strict=True))
        return ((mean / scale[:, None]) ** 2).sum(1)  # type: ignore[no-any-return, index]

    seen = statistics((1,) * 6)
    largest = np.array([statistics(signs).max() for signs in product((1, -1), repeat=6)])
    wanted = [(largest >= value - 1e-12).mean() for value in seen]
    assert paired(differences).p == pytest.approx(wanted)


def test_the_level_holds_for_devices_that_differ_and_features_that_depend() -> None:
    draw, wrong, times = np.random.default_rng(1), 0, 400
    for _ in range(times):
        heavy = draw.standard_t(1.5, (9, 1, 1)) * draw.normal(size=(9, 5, 3))
        wrong += bool(paired(heavy).named(0.05))
    assert wrong / times <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / times)


def test_what_has_changed_is_named_and_nothing_else() -> None:
    differences = np.random.default_rng(2).normal(0, 1, (40, 6, 4))
    differences[:, 4] += 1.0
    found = paired(differences)
    assert found.named(0.01) == (4,)
    assert found.least == pytest.approx(1 / 2000)


def test_few_devices_prove_little() -> None:
    differences = np.full((4, 2, 3), 5.0)
    assert paired(differences).least == 2**-3
    assert paired(differences[:1]).p == (1.0, 1.0)
    assert paired(np.zeros((5, 2, 3))).p == (1.0, 1.0)
