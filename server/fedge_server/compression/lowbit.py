"""Training on a grid: weights of eight, four, two or one bit that the loss sees while it is made small.

Every weight is code * scale, with one scale for each output channel. The codes come from rounding, whose
derivative is taken to be 1 (the straight-through estimator: Bengio, Léonard, Courville 2013, "Estimating or
Propagating Gradients Through Stochastic Neurons", arXiv:1308.3432); the scales are learned (Esser et al.
2020, "Learned Step Size Quantization", ICLR), from where the literature computes them:

- int8, codes -127 to 127; int4, codes -7 to 7: the scale of least squared error;
- ternary, codes -1, 0, 1: Li and Liu 2016, "Ternary Weight Networks", arXiv:1605.04711;
- binary, codes -1 and 1: Rastegari et al. 2016, "XNOR-Net", ECCV, mean |w|; activations stay float.

Scales are float16, so that code * scale is exact in float32: what is trained, what is exported and what
`fedge.packed` restores on the device are the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fusion, parametrize

from fedge.errors import CompressionError

Bits = Literal["int8", "int4", "ternary", "binary"]

_LEVELS: dict[Bits, int] = {"int8": 127, "int4": 7, "ternary": 1, "binary": 1}  # the largest code
_SMALL_SHARE = 0.1  # of all weights: so small a first or last layer stays at eight bits, as is the custom
_LEAST, _MOST = 2.0**-14, 2.0**15  # of a scale: normal numbers of float16
_SHARES = torch.linspace(0.2, 1.0, 33).tolist()  # of the largest |w|, tried for the top code

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepared(network: nn.Module, bits: Bits) -> nn.Module:
    """A copy to be trained (by `distil`, say) whose weights take effect as they will be on the grid.

    Batch normalisation is folded into the layer before it. A first or last layer that holds little of the
    network stays at eight bits, since it loses most from fewer. Biases get eight bits and one scale a layer;
    recurrent layers' biases become float16.

    Args:
        network: trained: starting from its weights is what makes few bits work.
        bits: of the weights.

    Raises:
        CompressionError: `bits` is unknown, the network has no layer to put on a grid, one that it has is
            already parametrised, or a weight is not finite.
    """
    if bits not in get_args(Bits):
        raise CompressionError(f"lowbit: bits is {bits!r}, not one of {', '.join(get_args(Bits))}")
    result = folded(copy.deepcopy(network))
    weights = list(_weights(result))
    if not weights:
        raise CompressionError(
            "lowbit: the network has no linear, convolutional, recurrent or embedding layer"
        )
    whole = sum(module.get_parameter(name).numel() for module, name in weights)
    ends = (weights[0], weights[-1])
    for module, name in weights:
        weight = module.get_parameter(name)
        small = (module, name) in ends and weight.numel() <= _SMALL_SHARE * whole
        grid = Grid(weight, "int8" if small else bits, per_channel=True)
        parametrize.register_parametrization(module, name, grid)
    for module, name in list(_biases(result)):
        bias = module.get_parameter(name)
        rounding = _Half() if isinstance(module, nn.RNNBase) else Grid(bias, "int8", per_channel=False)
        parametrize.register_parametrization(module, name, rounding)
    for module in result.modules():
        if isinstance(module, nn.RNNBase):
            module.register_forward_pre_hook(_collect)
            module.register_forward_hook(_release)
            _release(module)
    return result


def frozen(network: nn.Module) -> nn.Module:
    """A plain network whose weights are the values on the grid that `network` answers with, bit for bit.

    Raises:
        CompressionError: nothing of it is on a grid; it did not come from `prepared`.
    """
    for module in network.modules():
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module):
            _release(module)  # moving a network makes it keep tensors of autograd, which cannot be copied
    result = copy.deepcopy(network).eval()
    found = [module for module in result.modules() if parametrize.is_parametrized(module)]
    if not found:
        raise CompressionError("lowbit: the network was not prepared; nothing of it lies on a grid")
    for module in found:
        make_plain(module)
        if isinstance(module, nn.RNNBase):
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            _collect(module)
    return result


class Grid(nn.Module):
    """Weights to code * scale: the nearest code within the levels, under a learned scale (LSQ).

    The gradient of a weight is that of its rounded value; that of the scale s is, for each weight w, the
    code minus w / s, or the code where w lies beyond the levels; binary codes stay as they are when s moves,
    so there it is the code.
    """

    def __init__(self, weight: Tensor, bits: Bits, *, per_channel: bool) -> None:
        """Start from a scale (O, 1, ...) for each of O output channels (or one, (1, ...), for all)."""
        super().__init__()
        if not torch.isfinite(weight).all():
            raise CompressionError("lowbit: a weight is not finite; the network's training failed")
        self.bits = bits
        rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)  # (O, I)
        scale = _start(rows, bits).clamp(min=_LEAST)
        shape = [len(rows)] + [1] * (weight.ndim - 1)
        self.log_scale = nn.Parameter(scale.log().reshape(shape))

    def forward(self, weight: Tensor) -> Tensor:
        """The values on the grid."""
        scale = _through(_ToScale, self.log_scale.exp().clamp(_LEAST, _MOST))
        if self.bits == "binary":
            return _through(_Sign, weight / scale.detach()) * scale
        levels = _LEVELS[self.bits]
        return _through(_Round, (weight / scale).clamp(-levels, levels)) * scale


class _Half(nn.Module):
    """Values to the nearest float16."""

    def forward(self, values: Tensor) -> Tensor:
        return _through(_ToHalf, values)


class _Straight(torch.autograd.Function):
    """A step function whose derivative is taken to be 1."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _through(step: type[_Straight], x: Tensor) -> Tensor:
    result: Tensor = step.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Round(_Straight):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x) + 0.0  # there is no code of -0


class _Sign(_Straight):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0)


class _ToHalf(_Straight):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float() + 0.0


class _ToScale(_Straight):
    """To the nearest float16 of three fractional bits: steps of 6 to 12 %, and a byte to store."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        bits = x.half().view(torch.int16)
        return (bits + (1 << 6) >> 7 << 7).view(torch.float16).float()


def make_plain(module: nn.Module) -> None:
    """Put a module's parametrised values in the place of their parametrisations.

    Torch's own removal edits the class, which a deep copy shares with what it was copied from.
    """
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _start(rows: Tensor, bits: Bits) -> Tensor:
    """The scale (O,) of each row (O, I) from which training starts."""
    size = rows.abs()
    if bits == "binary":
        return size.mean(1)
    if bits == "ternary":
        large = size > 0.7 * size.mean(1, keepdim=True)
        return (size * large).sum(1) / large.sum(1).clamp(min=1)
    if bits == "int8":
        return size.amax(1) / 127
    levels, top = _LEVELS[bits], size.amax(1, keepdim=True)
    trials = torch.stack([share * top / levels for share in _SHARES]).clamp(min=_LEAST)  # (T, O, 1)
    errors = ((rows / trials).round().clamp(-levels, levels) * trials - rows).square().sum(2)  # (T, O)
    return trials.squeeze(2).gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _weights(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What goes on the grid, in the order in which the network's layers were made; output channels first."""
    for module in network.modules():
        if parametrize.is_parametrized(module):
            raise CompressionError("lowbit: the network has been parametrised before; give the plain one")
        if isinstance(module, _LAYERS):
            yield module, "weight"
        elif isinstance(module, nn.RNNBase):
            yield from ((module, name) for name, _ in module.named_parameters() if name.startswith("weight"))


def _biases(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in network.modules():
        if isinstance(module, (*_LAYERS, nn.RNNBase)):
            names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("bias")]
            yield from ((module, name) for name in names)


def _collect(module: nn.RNNBase, *_: Any) -> None:
    """Hand a recurrent layer the present values of its weights: it reads a list that it keeps."""
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def _release(module: nn.RNNBase, *_: Any) -> None:
    """Forget them: a tensor that autograd made cannot be copied with its module."""
    module._flat_weights = []


def folded(network: nn.Module) -> nn.Module:
    """The network, itself changed, with batch normalisation folded into the one layer that feeds it."""
    if not any(isinstance(module, _NORMS) for module in network.modules()):
        return network
    network.eval()
    modules = dict(network.named_modules())
    for layer, norm in _pairs(network):
        fuse = (
            fusion.fuse_linear_bn_eval if isinstance(modules[layer], nn.Linear) else fusion.fuse_conv_bn_eval
        )
        network.set_submodule(layer, fuse(modules[layer], modules[norm]))
        network.set_submodule(norm, nn.Identity())
    return network


def _pairs(network: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of layers and of the batch normalisation that alone reads each; none where tracing fails."""
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception:  # noqa: BLE001 - whatever a network does that cannot be traced, its norms stay as they are
        return
    modules = dict(network.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], _NORMS):
            continue
        source = node.args[0]
        if source.op != "call_module" or not isinstance(modules[source.target], _LAYERS[:-1]):
            continue
        if len(source.users) == calls.count(source.target) == calls.count(node.target) == 1:
            yield source.target, node.target
