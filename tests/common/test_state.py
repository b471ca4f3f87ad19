from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from fedge.learning.state import arrays_of, cast_like, digest, load_arrays, share_arrays


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_a_models_arrays_are_copies_in_the_order_of_its_state() -> None:
    network = model()
    arrays = arrays_of(network)
    # The step counter of batch norm is a whole number and stays where it is.
    assert list(arrays) == [n for n in network.state_dict() if n != "1.num_batches_tracked"]
    arrays["0.weight"][:] = 0
    assert network[0].weight.abs().sum() > 0  # type: ignore[index]


def test_arrays_that_are_loaded_come_back_and_are_not_shared() -> None:
    network, arrays = model(), arrays_of(model())
    arrays["0.bias"][:] = [1, 2, 3, 4]
    network[1].num_batches_tracked.fill_(7)  # type: ignore[operator, union-attr]
    for array in arrays.values():
        array.flags.writeable = False  # as bytes from a message are
    load_arrays(network, arrays)
    back = arrays_of(network)
    assert back["0.bias"].tolist() == [1, 2, 3, 4]
    assert network[1].num_batches_tracked == 7


def test_other_names_or_shapes_are_not_loaded() -> None:
    arrays = arrays_of(model())
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_arrays(model(), {**arrays, "0.bias": np.zeros(5, np.float32)})
    with pytest.raises(KeyError, match=r"0\.bias"):
        load_arrays(model(), {k: v for k, v in arrays.items() if k != "0.bias"})


def test_an_average_gets_the_types_of_the_model_back_and_counters_are_rounded() -> None:
    like = {"w": np.zeros(2, np.float32), "n": np.array(0, np.int64), "flag": np.array(False)}
    found = cast_like({"n": np.array(2.6), "w": np.array([0.5, 1.5]), "flag": np.array(0.6)}, like)
    assert list(found) == ["w", "n", "flag"]
    assert [found[name].dtype for name in found] == [np.float32, np.int64, np.bool_]
    assert (found["w"].tolist(), found["n"].tolist(), found["flag"].tolist()) == ([0.5, 1.5], 3, True)
    assert cast_like({"n": np.array(2**53 + 1)}, {"n": np.array(0)})["n"] == 2**53 + 1  # integers stay exact


def test_a_digest_is_over_names_types_shapes_and_bytes() -> None:
    by_hand = hashlib.sha256(b"w\0<f4\0(1, 2)\0" + np.float32([1, 2]).tobytes()).hexdigest()
    assert digest({"w": np.float32([[1, 2]])}) == by_hand


def test_a_digest_depends_on_what_is_said_and_not_on_how_it_is_stored() -> None:
    a, b = np.float32([[1, 2], [3, 4]]), np.int64([5])
    same = digest({"a": a, "b": b})
    for other in (
        {"b": b, "a": a},
        {"a": np.asfortranarray(a), "b": b},
        {"a": a.astype(">f4"), "b": b},
        {"a": np.repeat(a, 2, axis=0)[::2], "b": b},
    ):
        assert digest(other) == same
    for different in (
        {"a": a + 1, "b": b},
        {"a": a.T, "b": b},
        {"a": a.ravel(), "b": b},
        {"a": a.astype(np.float64), "b": b},
        {"a": a, "c": b},
        {"a": a},
        {"a": a, "b": b.reshape(())},
    ):
        assert digest(different) != same


def test_a_model_that_shares_arrays_answers_with_them_and_holds_no_copy() -> None:
    network = model()
    arrays = {name: value + 1 for name, value in arrays_of(network).items()}
    share_arrays(network, arrays)
    assert digest(arrays_of(network)) == digest(arrays)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            assert np.shares_memory(value.numpy(), arrays[name])
    with pytest.raises(KeyError):
        share_arrays(network, {name: value for name, value in arrays.items() if "bias" not in name})


def test_one_parameter_under_two_names_stays_one() -> None:
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    share_arrays(tied, arrays_of(tied))
    assert tied[1].weight is tied[0].weight


def test_arrays_that_cannot_be_written_to_are_copied() -> None:
    network = model()
    arrays = arrays_of(network)
    for value in arrays.values():
        value.flags.writeable = False
    share_arrays(network, arrays)
    assert digest(arrays_of(network)) == digest(arrays)
