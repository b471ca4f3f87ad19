from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedge.errors import ConfigError, FormatError
from fedge.learning.preprocess import build
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.statistics import Moments

GREY = Spec("image", (5, 7), "uint8", ("a", "b"))
FLOAT = Spec("image", (5, 7), "float32", ("a", "b"))
COLOUR = Spec("image", (5, 7, 3), "uint8", ("a", "b"))
TABLE = Spec("features", (2,), "float32", ("a", "b"))
SIGNAL = Spec("signal", (4, 2), "float32", ("a", "b"))
TEXT = Spec("text", (4,), "uint8", ("a", "b"))
NAN = float("nan")


def images(spec: Spec, n: int = 3) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, *spec.shape)).astype(spec.dtype)


def out(spec: Spec, moments: Moments | None, noise_filter: Any, raw: Any) -> Any:
    return build(spec, moments, noise_filter)(torch.from_numpy(np.asarray(raw, spec.dtype))).numpy()


def test_bytes_come_to_zero_to_one_without_moments_and_floats_stay() -> None:
    raw = images(GREY)
    assert out(GREY, None, "none", raw) == pytest.approx(raw[:, None] / 255.0)
    assert out(FLOAT, None, "none", raw).tolist() == raw[:, None].astype(np.float32).tolist()


def test_a_signal_is_standardised_by_channel_and_a_missing_value_is_the_mean() -> None:
    raw = np.array([[[0, 5], [2, 5], [NAN, 5], [4, 5]], [[0, 7], [2, 7], [2, 7], [4, 7]]], np.float32)
    found = out(SIGNAL, Moments.of(raw, SIGNAL), "none", raw)
    std = np.sqrt((2 * 2**2 + 2 * 2**2) / 7)  # of 0 2 4 0 2 2 4, whose mean is 2
    assert found.shape == (2, 2, 4)
    assert found[0, 0] == pytest.approx(np.array([-2, 0, 0, 2]) / std)
    assert found[:, 1].tolist() == [[-1] * 4, [1] * 4]
    assert out(SIGNAL, None, "none", raw)[0, 0].tolist() == [0, 2, 0, 4]
    assert out(SIGNAL, None, "clip", 9 * raw)[1, 1].tolist() == [5] * 4


def test_text_stays_the_codes_it_is_and_has_no_moments() -> None:
    raw = np.array([[0, 1, 1, 0]], np.uint8)
    assert build(TEXT, None, "none")(torch.from_numpy(raw)).tolist() == raw.tolist()
    with pytest.raises(ConfigError, match="text inputs take one of none"):
        build(TEXT, None, "clip")
    with pytest.raises(FormatError, match="text has none"):
        Moments.of(raw, TEXT)


def test_an_image_with_moments_has_mean_zero_and_deviation_one() -> None:
    raw = images(GREY)
    found = out(GREY, Moments.of(raw, GREY), "none", raw)
    assert found.shape == (3, 1, 5, 7)
    assert found == pytest.approx((raw[:, None] - raw.mean()) / raw.std(), abs=1e-5)


def test_each_colour_channel_has_its_own_moments_and_comes_first() -> None:
    raw = images(COLOUR)
    raw[..., 1] //= 4
    found = out(COLOUR, Moments.of(raw, COLOUR), "none", raw)
    assert found.shape == (3, 3, 5, 7)
    assert found.mean(axis=(0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-5)
    assert found.std(axis=(0, 2, 3)) == pytest.approx([1, 1, 1], abs=1e-5)


def test_one_channel_may_stand_alone_as_an_axis() -> None:
    assert out(
        Spec("image", (5, 7, 1), "uint8", ("a", "b")), None, "none", images(GREY)[..., None]
    ).shape == (
        3,
        1,
        5,
        7,
    )


@pytest.mark.parametrize("spec", [GREY, COLOUR, FLOAT])
def test_the_median_filter_is_scipys_with_edges_repeated(spec: Spec) -> None:
    raw = images(spec)
    size = (1, 3, 3, 1)[: raw.ndim]
    expected = ndimage.median_filter(raw, size=size, mode="nearest").astype(np.float64)
    scale = 255.0 if spec.dtype == "uint8" else 1.0
    found = out(spec, None, "median", raw) * scale
    assert found == pytest.approx(expected.transpose(0, 3, 1, 2) if raw.ndim == 4 else expected[:, None])


@pytest.mark.parametrize("spec", [GREY, COLOUR])
def test_the_gaussian_filter_is_the_binomial_kernel_with_edges_repeated(spec: Spec) -> None:
    raw = images(spec).astype(np.float64)
    expected = raw
    for axis in (1, 2):
        expected = ndimage.convolve1d(expected, [0.25, 0.5, 0.25], axis=axis, mode="nearest")
    found = out(spec, None, "gaussian", raw) * 255
    wanted = expected.transpose(0, 3, 1, 2) if raw.ndim == 4 else expected[:, None]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_a_single_wrong_pixel_is_removed_by_the_median() -> None:
    raw = np.full((1, 5, 7), 10, np.uint8)
    raw[0, 2, 3] = 255
    assert (out(GREY, None, "median", raw) * 255).tolist() == np.full((1, 1, 5, 7), 10.0).tolist()


def test_a_missing_value_becomes_its_columns_mean() -> None:
    raw = np.float32([[1, 10], [3, NAN], [NAN, 30]])
    # Means 2 and 20, deviations 1 and 10.
    assert out(TABLE, Moments.of(raw, TABLE), "none", raw).tolist() == [[-1, -1], [1, 0], [0, 1]]
    assert out(TABLE, None, "none", raw).tolist() == [[1, 10], [3, 0], [0, 30]]


def test_a_column_without_values_or_spread_becomes_zero() -> None:
    raw = np.float32([[NAN, 5], [NAN, 5]])
    assert out(TABLE, Moments.of(raw, TABLE), "none", raw).tolist() == [[0, 0], [0, 0]]


def test_clip_cuts_at_five_deviations() -> None:
    moments = Moments(np.array([4.0, 4.0]), np.array([0.0, 8.0]), np.array([4.0, 32.0]))  # means 0, 2; 1, 2
    raw = np.float32([[7, 13], [-7, -9], [4, NAN]])
    assert out(TABLE, moments, "clip", raw).tolist() == [[5, 5], [-5, -5], [4, 0]]
    assert out(TABLE, moments, "none", raw).tolist() == [[7, 5.5], [-7, -5.5], [4, 0]]


@pytest.mark.parametrize(
    ("spec", "name", "valid"),
    [
        (GREY, "clip", "none, median, gaussian"),
        (TABLE, "median", "none, clip"),
        (TABLE, "gaussian", "none, clip"),
    ],
)
def test_a_filter_for_the_other_kind_of_input_is_refused(spec: Spec, name: Any, valid: str) -> None:
    with pytest.raises(ConfigError, match=f"model.filter = '{name}': {spec.kind} inputs take one of {valid}"):
        build(spec, None, name)


def test_pre_processing_is_no_parameter_and_runs_before_the_network() -> None:
    preprocess = build(GREY, Moments.of(images(GREY), GREY), "median")
    assert list(preprocess.parameters()) == []
    whole = WholeModel(preprocess, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(35, 2)))
    raw = torch.from_numpy(images(GREY))
    assert torch.equal(whole(raw), whole.network(preprocess(raw)))
