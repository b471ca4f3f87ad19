"""Shares of classes from answers alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.errors import FedgeError
from fedge_server.drift.label_shift import class_shares


def test_the_shares_come_back_where_only_they_have_changed() -> None:
    answered_given_class = np.array([[0.9, 0.2, 0.0], [0.1, 0.7, 0.1], [0.0, 0.1, 0.9]])
    before, now = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    found = class_shares(answered_given_class * before * 1000, answered_given_class @ now * 500)
    assert found == pytest.approx(now)


def test_a_model_that_does_not_tell_classes_apart_says_nothing() -> None:
    with pytest.raises(FedgeError, match="nothing follows"):
        class_shares(np.full((3, 3), 10.0), np.array([1.0, 2, 3]))
