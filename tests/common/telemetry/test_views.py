"""Features of raw inputs: worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.spec import Spec
from fedge.telemetry.views import MAX_FEATURES, features_of, names_of

LABELS = ("a", "b")


def test_the_features_of_a_table_are_its_columns_and_nan_stays_missing() -> None:
    spec = Spec("features", (2,), "float32", LABELS, ("age", "pulse"))
    found = features_of(np.array([[40, np.nan], [50, 60]], np.float32), spec)
    assert names_of(spec) == ("age", "pulse")
    assert found.tolist()[1] == [50, 60]
    assert np.isnan(found[0, 1])


def test_of_a_wide_table_evenly_spaced_columns_are_looked_at() -> None:
    spec = Spec("features", (128,), "float32", LABELS)
    found = features_of(np.arange(128, dtype=np.float32)[None], spec)
    assert found.shape == (1, MAX_FEATURES)
    assert found[0, :3].tolist() == [0, 2, 4]
    assert names_of(spec)[:3] == ("0", "2", "4")


def test_a_signal_has_mean_deviation_and_step_of_each_channel() -> None:
    spec = Spec("signal", (4, 2), "float32", LABELS, ("x", "y"))
    window = np.array([[[0, 5], [2, np.nan], [0, 5], [2, 5]]], np.float32)
    assert names_of(spec) == ("x mean", "y mean", "x deviation", "y deviation", "x step", "y step")
    assert features_of(window, spec).tolist() == [[1, 5, 1, 0, 2, 0]]


def test_a_channel_that_is_missing_throughout_is_missing_in_its_features() -> None:
    spec = Spec("signal", (3, 1), "float32", LABELS)
    assert np.isnan(features_of(np.full((1, 3, 1), np.nan, np.float32), spec)).all()


def test_an_image_turned_by_a_quarter_keeps_its_brightness_and_not_its_cells() -> None:
    spec = Spec("image", (8, 8), "uint8", LABELS)
    image = np.zeros((1, 8, 8), np.uint8)
    image[0, :2, :] = 200  # the top
    turned = np.rot90(image, axes=(1, 2)).copy()
    names, before, after = names_of(spec), features_of(image, spec)[0], features_of(turned, spec)[0]
    assert (names[:2], names[-3:]) == (("cell 0,0", "cell 0,1"), ("deviation", "across", "down"))
    assert before[:4].tolist() == [200, 200, 200, 200]
    assert after[:4].tolist() == [200, 0, 0, 0]
    assert before[-3] == after[-3]
    assert (before[-2], before[-1]) == (after[-1], after[-2]) == (0, pytest.approx(200 / 7))


def test_colours_are_looked_at_in_grey_and_small_images_have_fewer_cells() -> None:
    spec = Spec("image", (2, 1, 3), "float32", LABELS)
    found = features_of(np.array([[[[1, 2, 3]], [[4, 5, 6]]]], np.float32), spec)
    assert names_of(spec) == ("cell 0,0", "cell 1,0", "deviation", "across", "down")
    assert found.tolist() == [[2, 5, 1.5, 0, 3]]


def test_a_text_has_the_shares_of_groups_of_its_characters() -> None:
    spec = Spec("text", (4,), "uint8", tuple("abcd"))
    assert features_of(np.array([[0, 0, 3, 1]], np.uint8), spec).tolist() == [[0.5, 0.25, 0, 0.25]]
