from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedge.artefact import pack, unpack
from fedge.config import Distil
from fedge.errors import CompressionError
from fedge.inference import CompactModel
from fedge.learning.models import gru, small_cnn
from fedge.learning.whole import WholeModel
from fedge.onnx_layout import stored_tensors
from fedge.packed import _on_grid
from fedge.spec import Spec
from fedge_server.compression.distil import distil
from fedge_server.compression.export import export
from fedge_server.compression.lowbit import Grid, frozen, prepared

BITS = ["int8", "int4", "ternary", "binary"]
QUICK = Distil(epochs=8, learning_rate=0.003)
IMAGE = Spec("image", (8, 8), "uint8", tuple("abcdefghij"))


@pytest.fixture(scope="module")
def data(digits):
    x = torch.from_numpy(digits.proxy.x).float().flatten(1) / 8 - 1
    return x, torch.from_numpy(digits.proxy.y)


@pytest.fixture(scope="module")
def student(trained, data):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        start = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    return distil(trained.network, start, *data, Distil(epochs=30, learning_rate=0.01), seed=0)


def convolutional(norm=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = small_cnn(4, 12, norm=norm)(IMAGE)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
        return network.eval()


@pytest.mark.parametrize("bits", BITS)
def test_frozen_answers_as_the_trained_network_bit_for_bit_and_is_plain(bits, student, data, trained):
    learned = distil(trained.network, prepared(student, bits), *data, Distil(epochs=2), seed=0)
    plain = frozen(learned)
    assert torch.equal(plain(data[0]), learned(data[0]))
    assert [type(module) for module in plain.modules()] == [type(module) for module in student.modules()]
    assert list(plain.state_dict()) == list(student.state_dict())
    assert torch.equal(plain(data[0]), learned(data[0]))  # freezing has not changed what it was given


@pytest.mark.parametrize(("bits", "levels"), [("int8", 127), ("int4", 7), ("ternary", 1), ("binary", 1)])
def test_weights_are_codes_times_a_scale_that_float16_holds(bits, levels):
    torch.manual_seed(0)
    grid = Grid(torch.randn(6, 3, 5, 5), bits, per_channel=True)
    values = grid(torch.randn(6, 3, 5, 5)).detach()
    wanted = grid.log_scale.exp().detach()
    power = 2.0 ** wanted.log2().floor()
    scale = (wanted / power * 8).round() / 8 * power  # three bits after the point
    assert torch.equal(scale, scale.half().float())
    codes = values / scale
    assert torch.equal(codes, codes.round())
    assert torch.equal(codes * scale, values)
    assert codes.abs().max() <= levels
    assert (codes == 0).any() == (bits != "binary")
    assert not torch.signbit(values[values == 0]).any()


def test_scales_begin_where_the_papers_have_them():
    weight = torch.tensor([[0.9, -0.5, 0.1, -0.1]])
    scale = {bits: Grid(weight, bits, per_channel=True).log_scale.exp().item() for bits in BITS}
    assert scale["int8"] == pytest.approx(0.9 / 127)
    assert scale["binary"] == pytest.approx(0.4)  # the mean of all
    assert scale["ternary"] == pytest.approx(0.7)  # the mean of those above 0.7 * 0.4 = 0.28
    # Among 33 shares of 0.9 / 7 the one of least squared error, checked one by one.
    candidates = np.linspace(0.2, 1, 33) * 0.9 / 7
    errors = [
        np.square(np.clip(np.rint(weight.numpy() / s), -7, 7) * s - weight.numpy()).sum() for s in candidates
    ]
    assert scale["int4"] == pytest.approx(candidates[int(np.argmin(errors))], rel=1e-5)


def test_gradients_pass_straight_to_weights_and_to_scales_as_lsq_has_them():
    weight = torch.tensor([[0.6, -0.1, 3.0]], requires_grad=True)
    grid = Grid(torch.ones(1, 3), "ternary", per_channel=True)  # its scale is 1
    assert grid(weight).tolist() == [[1.0, 0.0, 1.0]]
    grid(weight).backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert weight.grad.tolist() == [[1.0, 10.0, 0.0]]  # none beyond the levels
    # code - w for the first two, the code for the third; by the logarithm it is times the scale, 1.
    assert grid.log_scale.grad.item() == pytest.approx(1 * (1 - 0.6) + 10 * (0 + 0.1) + 100 * 1, rel=1e-5)


def test_of_binary_weights_the_scale_learns_by_the_codes_alone():
    weight = torch.tensor([[0.6, -0.1, 3.0]], requires_grad=True)
    grid = Grid(torch.ones(1, 3), "binary", per_channel=True)  # its scale is 1
    grid(weight).backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert weight.grad.tolist() == [[1.0, 10.0, 100.0]]
    assert grid.log_scale.grad.item() == pytest.approx(1 - 10 + 100)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_and_bias_of_the_exported_file_is_on_a_grid(bits):
    class Input(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw.float().unsqueeze(1) / 255

    plain = frozen(prepared(convolutional(), bits))
    installed = export(WholeModel(Input(), plain), IMAGE)
    found = [
        (stored, _on_grid(stored, installed[stored.offset : stored.offset + stored.length]))
        for stored in stored_tensors(installed)
        if stored.data_type == 1 and stored.length >= 32
    ]
    assert len(found) == 7  # four layers; the first one's four biases are too few
    assert all(piece is not None for _, piece in found)
    wire = pack(installed)
    assert unpack(wire, len(installed)) == installed


def test_batch_normalisation_is_folded_and_the_answers_stay():
    network, x = convolutional(), torch.randn(5, 1, 8, 8)
    ready = prepared(network, "int8")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    torch.testing.assert_close(ready(x), network(x), atol=0.03, rtol=0.03)
    assert isinstance(network[1], nn.BatchNorm2d)


def test_a_normalisation_that_no_single_layer_feeds_stays():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.a(x) + self.b(x))

    assert isinstance(prepared(Sum(), "int8").norm, nn.BatchNorm1d)


def test_a_small_first_and_last_layer_stay_at_eight_bits_and_large_ones_do_not():
    def widths(network):
        return [
            module.parametrizations.weight[0].bits
            for module in prepared(network, "ternary").modules()
            if hasattr(module, "parametrizations")
        ]

    def stack(*sizes):
        return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))

    assert widths(stack(4, 40, 40, 4)) == ["int8", "ternary", "int8"]
    assert widths(stack(40, 40, 40, 4)) == ["ternary", "ternary", "int8"]


def test_nothing_given_is_changed_and_the_same_seed_gives_the_same_weights(student, data, trained, helpers):
    before = helpers.weights(student)
    runs = []
    for seed in (0, 0, 1):
        ready = prepared(student, "ternary")
        kept = helpers.weights(ready)
        runs.append(
            helpers.weights(frozen(distil(trained.network, ready, *data, Distil(epochs=1), seed=seed)))
        )
        assert helpers.same(kept, helpers.weights(ready))
    assert helpers.same(before, helpers.weights(student))
    assert helpers.same(runs[0], runs[1])
    assert not helpers.same(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int4", "ternary", "binary"])
def test_training_on_the_grid_gives_back_what_rounding_lost(bits, student, data, trained, digits, helpers):
    float_share = helpers.share_right(student, digits.gate)
    ready = prepared(student, bits)
    learned = frozen(distil(trained.network, ready, *data, QUICK, seed=0))
    assert helpers.share_right(learned, digits.gate) > float_share - 0.03


@pytest.mark.slow
def test_few_bits_travel_in_few_bytes(student, digits, helpers):
    sizes = {}
    for bits in BITS:
        installed = export(WholeModel(helpers.Scale(), frozen(prepared(student, bits))), digits.spec)
        wire = pack(installed)
        sizes[bits] = len(wire)
        np.testing.assert_array_equal(
            CompactModel(unpack(wire, len(installed)), digits.spec).run(digits.gate.x)[1],
            CompactModel(installed, digits.spec).run(digits.gate.x)[1],
        )
    graph = 900  # bytes that are no weights, at most
    parameters = 64 * 48 + 48 * 48 + 48 * 10 + 106
    for bits, width in (("int8", 8), ("int4", 4), ("ternary", 1.6), ("binary", 1)):
        eight = 8 * 480 if bits != "int8" else 0  # the last layer
        assert sizes[bits] < graph + (width * parameters + eight) / 8 + 212


@pytest.mark.slow
def test_a_recurrent_network_with_an_embedding_is_put_on_the_grid_and_copied_between_steps():
    spec = Spec("text", (9,), "uint8", tuple("abcdefgh"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = gru(16, embedding=8)(spec)
    ready = prepared(network, "int4")
    x = torch.randint(0, 8, (6, 9))
    ready(x).sum().backward()
    assert all(parameter.grad is not None for parameter in ready.parameters())
    again = copy.deepcopy(ready)
    plain = frozen(again.to(torch.float32))
    assert torch.equal(plain(x), ready(x))
    assert torch.equal(again(x), ready(x))
    assert [type(module) for module in plain.modules()] == [type(module) for module in network.modules()]

    class Index(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw.long()

    installed = export(WholeModel(Index(), plain), spec)
    float_file = export(WholeModel(Index(), network), spec)
    assert len(pack(installed)) < len(pack(float_file)) / 2


@pytest.mark.parametrize(
    ("network", "bits", "message"),
    [
        (nn.Linear(2, 2), "int2", "not one of int8, int4, ternary, binary"),
        (nn.ReLU(), "int8", "no linear, convolutional"),
        (prepared(nn.Linear(2, 2), "int8"), "int8", "parametrised before"),
    ],
)
def test_what_cannot_be_prepared_is_refused(network, bits, message):
    with pytest.raises(CompressionError, match=message):
        prepared(network, bits)


def test_weights_that_are_not_finite_and_networks_that_were_not_prepared_are_refused():
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(CompressionError, match="not finite"):
        prepared(broken, "int4")
    with pytest.raises(CompressionError, match="was not prepared"):
        frozen(nn.Linear(2, 2))
