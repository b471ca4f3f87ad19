"""Training that feels int8 (Jacob et al. 2018): weights and inputs of layers are rounded while they learn.

"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
section 3: every layer sees its input and its weights as `quantise` will round them, with the derivative of
the straight-through estimator inside the range and 0 beyond it; ranges of inputs are moving averages of what
batches span. What comes out is a plain float network that loses less when `quantise` makes it int8.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedge.errors import CompressionError
from fedge_server.compression.lowbit import folded, make_plain

_LAYERS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d)  # those that onnxruntime computes in integers
_CODES: Final = 64  # the largest code of a weight: seven bits, as `quantise` rounds it
_KEPT: Final = 0.99  # of a range, at each batch
_LEAST: Final = 1e-8  # of a scale
_INPUT: Final = "rounded_input"


def prepared(network: nn.Module) -> nn.Module:
    """A copy to be trained (by `distil`, say) whose layers take effect as they will in int8.

    Batch normalisation is folded into the layer before it, as the exporter does.

    Args:
        network: trained: a few epochs from its weights on are enough.

    Raises:
        CompressionError: the network has no layer that is computed in integers, or one that is parametrised.
    """
    result = folded(copy.deepcopy(network))
    layers = [module for module in result.modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise CompressionError("aware: the network has no linear or convolutional layer to round")
    for layer in layers:
        if parametrize.is_parametrized(layer):
            raise CompressionError("aware: the network has been parametrised before; give the plain one")
        parametrize.register_parametrization(layer, "weight", RoundedWeights())
        layer.add_module(_INPUT, RoundedInput())
        layer.register_forward_pre_hook(_round_input)
    return result


def frozen(network: nn.Module) -> nn.Module:
    """A plain network with the weights that `network` answers with; inputs of layers are float again.

    Raises:
        CompressionError: nothing of it is rounded; it did not come from `prepared`.
    """
    result = copy.deepcopy(network).eval()
    found = [module for module in result.modules() if _INPUT in dict(module.named_children())]
    if not found:
        raise CompressionError("aware: the network was not prepared; nothing of it is rounded")
    for layer in found:
        make_plain(layer)
        delattr(layer, _INPUT)
        layer._forward_pre_hooks.clear()
    return result


class RoundedWeights(nn.Module):
    """Weights (O, ...) to seven bits, with a scale for each output channel: its largest weight is code 64."""

    def forward(self, weight: Tensor) -> Tensor:
        """What the weights will be."""
        scale = weight.detach().flatten(1).abs().amax(1).clamp(min=_LEAST * _CODES) / _CODES
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -_CODES, _CODES)


class RoundedInput(nn.Module):
    """A layer's input to eight bits between the ends that batches have had, of which 0 is one value."""

    lowest: Tensor
    highest: Tensor

    def __init__(self) -> None:
        """No batch has been seen: nothing is rounded until one of training has."""
        super().__init__()
        self.register_buffer("lowest", torch.tensor(0.0))
        self.register_buffer("highest", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        """The input (B, ...) as the layer will see it."""
        if self.training:
            low, high = torch.aminmax(x.detach())
            kept = _KEPT if self.highest > self.lowest else 0.0
            self.lowest.mul_(kept).add_(low.clamp(max=0.0), alpha=1 - kept)
            self.highest.mul_(kept).add_(high.clamp(min=0.0), alpha=1 - kept)
        if not self.highest > self.lowest:
            return x
        scale = ((self.highest - self.lowest) / 255).clamp(min=_LEAST)
        zero = (-self.lowest / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def _round_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, _INPUT)(inputs[0]), *inputs[1:])
