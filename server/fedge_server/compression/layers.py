"""The layer that gives a network's answer, and what reaches it: both stages that change networks need it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedge.errors import CompressionError

ANSWERING = (nn.Linear, nn.modules.conv._ConvNd)


def last_layer(network: nn.Module, example: Tensor) -> nn.Module:
    """The linear or convolutional layer that runs last: its outputs are the classes.

    Args:
        network: pre-processed inputs to logits; it answers once, in evaluation mode.
        example: pre-processed inputs (B, ...).

    Raises:
        CompressionError: the network has no such layer.
    """
    order: list[nn.Module] = []
    modes = [(module, module.training) for module in network.modules()]
    handles = [
        module.register_forward_pre_hook(lambda layer, _inputs: order.append(layer))
        for module in network.modules()
        if isinstance(module, ANSWERING)
    ]
    try:
        with torch.no_grad():
            network.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not order:
        raise CompressionError("the network has no linear or convolutional layer")
    return order[-1]


class Tap:
    """Keeps what goes into a network's last layer, (B, F), of every forward pass until it is closed.

    Positions of a convolution or of a sequence are averaged, so F is the layer's number of inputs.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        layer = last_layer(network, example)
        self._spatial = not isinstance(layer, nn.Linear)
        self._handle = layer.register_forward_pre_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept = inputs[0]

    def take(self) -> Tensor:
        """What the last forward pass brought, as float32; it is forgotten here."""
        values, self._kept = self._kept, None
        if values is None:
            raise CompressionError("distil: a forward pass left out the network's last layer")
        values = values.float()
        if self._spatial:
            return values.flatten(2).mean(2)  # (B, F, ...) to (B, F)
        return values.flatten(1, -2).mean(1) if values.dim() > 2 else values  # (B, ..., F) to (B, F)

    def close(self) -> None:
        """Take the hook off the network again."""
        self._handle.remove()
