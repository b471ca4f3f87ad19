"""`.npy` bytes as Flower's arrays carry them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from fedge.wire import npy
from fedge.wire.arrays import MemoryArray, in_memory

NUMBERS = st.sampled_from(
    [np.dtype(name) for name in ("float32", "float16", "int64", "uint8", "bool", ">f8")]
)


def saved(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=True)
    return buffer.getvalue()


@given(of_numpy.arrays(NUMBERS, of_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
def test_values_are_those_that_numpy_reads(value: np.ndarray) -> None:
    for order in (value, value.T, value[..., ::-1] if value.ndim else value):
        found = npy.decode(saved(order))
        assert (found.dtype, found.shape) == (order.dtype, order.shape)
        np.testing.assert_array_equal(found, order)
        assert found.flags.writeable
        assert found.flags.c_contiguous


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(data: bytes) -> None:
    for found in (data, b"\x93NUMPY\x01\x00" + data):
        with pytest.raises(ValueError, match=r"npy bytes|buffer"):
            npy.decode(found)


@pytest.mark.parametrize("cut", [1, 12, 100])
def test_bytes_that_end_early_are_refused(cut: int) -> None:
    with pytest.raises(ValueError, match=r"npy bytes|buffer"):
        npy.decode(saved(np.arange(3.0))[:-cut])


def test_objects_are_refused_and_never_loaded() -> None:
    with pytest.raises(ValueError, match=r"no \.npy bytes of numbers"):
        npy.decode(saved(np.array([{"a": 1}], dtype=object)))


def test_a_long_header_is_not_read() -> None:
    data = saved(np.zeros(2, np.float32))
    long = data[:8] + (2000).to_bytes(2, "little") + data[10:127] + b" " * 1882 + b"\n" + data[128:]
    assert npy.declared(long) is None


def test_an_array_of_flowers_is_decoded_and_one_in_memory_is_taken_as_it_is() -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = in_memory(Array(value))
    assert isinstance(found, MemoryArray)
    np.testing.assert_array_equal(found.numpy(), value)
    assert in_memory(found) is found
