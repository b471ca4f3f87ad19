"""Recurrent networks: exported as one operator, stored in eight bits, not pruned."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fedge.config import Prune
from fedge.errors import CompressionError
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import resolve
from fedge_server.compression.export import export, random_input
from fedge_server.compression.prune import prune
from fedge_server.compression.quantise import quantise

TEXT = Spec("text", (9,), "uint8", tuple("abcdefgh"))
SIGNAL = Spec("signal", (12, 3), "float32", ("rest", "walk"))


CASES = [("characters", "gru", TEXT), ("characters", "lstm", TEXT), ("signals", "gru", SIGNAL)]


@pytest.fixture(scope="module", params=CASES, ids=("characters-gru", "characters-lstm", "signals-gru"))
def network(request: Any) -> tuple[WholeModel, Spec]:
    """A network whose weights differ from unit to unit."""
    name, model, spec = request.param
    torch.manual_seed(0)
    task = resolve(name)
    return WholeModel(task.preprocess(spec, None, "none"), task.model(model)(spec)).eval(), spec


@pytest.fixture(scope="module")
def made(network: tuple[WholeModel, Spec]) -> tuple[WholeModel, Spec, bytes]:
    """The network and its graph."""
    return *network, export(*network)


@pytest.mark.slow
def test_the_graph_holds_one_recurrent_operator_whose_weights_are_constants(made):
    _, _, data = made
    graph = onnx.load_model_from_string(data).graph
    (layer,) = [node for node in graph.node if node.op_type in ("GRU", "LSTM")]
    assert set(layer.input[1:4]) <= {tensor.name for tensor in graph.initializer}


@pytest.mark.slow
def test_in_eight_bits_it_is_a_third_and_answers_nearly_the_same(made):
    whole, spec, data = made
    raw = random_input(spec, 64, seed=1)
    small = quantise(data, raw)
    assert len(small) < 0.38 * len(data)
    with torch.no_grad():
        wanted = torch.softmax(whole(torch.from_numpy(raw)), dim=1).numpy()
    _, given = CompactModel(small, spec).run(raw)
    assert np.abs(given - wanted).max() < 0.02
    assert quantise(data, raw) == small


def test_pruning_says_that_it_leaves_recurrent_layers_alone(network):
    whole, spec = network
    example = whole.preprocess(torch.from_numpy(random_input(spec, 2, seed=0)))
    with pytest.raises(CompressionError, match="recurrent layers cannot be pruned"):
        prune(whole.network, example, 0.5, Prune(), seed=0)
