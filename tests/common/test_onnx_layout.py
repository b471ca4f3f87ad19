from __future__ import annotations

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from fedge.onnx_layout import Stored, stored_tensors


def test_raw_constants_are_found_where_they_lie() -> None:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, -2], np.int8), np.array(7, np.int64)]
    graph = onnx.GraphProto(name="g")
    graph.initializer.append(helper.make_tensor("text", onnx.TensorProto.STRING, [1], [b"raw"]))
    graph.initializer.extend(numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(arrays))
    data = onnx.ModelProto(ir_version=10, graph=graph, doc_string="d").SerializeToString()
    found = stored_tensors(data)
    assert [(item.shape, item.data_type) for item in found] == [((2, 3), 1), ((2,), 3), ((), 7)]
    for item, array in zip(found, arrays, strict=True):
        assert data[item.offset : item.offset + item.length] == array.tobytes()


def test_a_tensor_whose_shape_and_bytes_disagree_or_that_is_empty_is_left_out() -> None:
    graph = onnx.GraphProto(name="g")
    for dims, raw in (([3], bytes(8)), ([0], b""), ([2], bytes(8))):
        tensor = graph.initializer.add(data_type=onnx.TensorProto.FLOAT, raw_data=raw)
        tensor.dims.extend(dims)
    found = stored_tensors(onnx.ModelProto(graph=graph).SerializeToString())
    assert [item.shape for item in found] == [(2,)]
    assert isinstance(found[0], Stored)


@given(st.binary(max_size=300))
def test_any_bytes_may_be_given(data: bytes) -> None:
    for item in stored_tensors(data):
        assert 0 <= item.offset < item.offset + item.length <= len(data)
