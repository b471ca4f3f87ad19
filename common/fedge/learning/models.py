"""The built-in architectures, and scaled-down students of the same families.

Legend: B batch, C channels, H W image sides, F features, T time, K classes, E embedding, D hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

import torch
from torch import nn

from fedge.errors import ConfigError
from fedge.spec import Spec

Builder = Callable[[Spec], nn.Module]


def _features(spec: Spec) -> int:
    return prod(spec.shape)


def logistic(spec: Spec) -> nn.Module:
    """Multinomial logistic regression: one linear layer, F * K + K parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_features(spec), spec.classes))


def mlp(*hidden: int, norm: bool = False) -> Builder:
    """A multi-layer perceptron with ReLU; 200 and 200 hidden units make McMahan's 2NN, 199,210 on 28x28.

    McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data.

    Args:
        hidden: units of each hidden layer.
        norm: with batch normalisation (Ioffe and Szegedy 2015) before each ReLU.
    """

    def build(spec: Spec) -> nn.Module:
        sizes = (_features(spec), *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], spec.classes))

    return build


def cnn(spec: Spec) -> nn.Module:
    """McMahan's CNN: 5x5 convolutions of 32 and 64, max-pooled, dense 512; 1,663,370 parameters on 28x28.

    Raises:
        ConfigError: the image is smaller than 4x4, which leaves nothing after two poolings.
    """
    h, w = _sides(spec, "cnn")
    return nn.Sequential(
        nn.Conv2d(spec.channels, 32, 5, padding=2),
        nn.MaxPool2d(2),  # before the ReLU: the same values and gradients, from a quarter of the work
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (h // 4) * (w // 4), 512),
        nn.ReLU(),
        nn.Linear(512, spec.classes),
    )


def small_cnn(width: int, hidden: int, *, norm: bool = False) -> Builder:
    """A student of the CNN's family: 3x3 convolutions of `width` and 2 * `width`, strided, dense `hidden`.

    Args:
        width: channels of the first convolution.
        hidden: units of the dense layer.
        norm: with batch normalisation (Ioffe and Szegedy 2015) after each convolution.
    """

    def build(spec: Spec) -> nn.Module:
        h, w = _sides(spec, "small_cnn")
        return nn.Sequential(
            nn.Conv2d(spec.channels, width, 3, stride=2, padding=1),
            *([nn.BatchNorm2d(width)] if norm else []),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            *([nn.BatchNorm2d(2 * width)] if norm else []),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * -(-h // 4) * -(-w // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, spec.classes),
        )

    return build


def cnn3(width: int) -> Builder:
    """Three strided 3x3 convolutions of `width`, twice and twice `width`, normalised, and one linear layer.

    It has no dense layer over positions before the image is 4x4 (of 28x28), where most parameters of other
    small networks lie. About 54 * width^2 + 32 * width * K parameters on 28x28.

    Args:
        width: channels of the first convolution.
    """

    def build(spec: Spec) -> nn.Module:
        h, w = _sides(spec, "cnn3")
        layers: list[nn.Module] = []
        inputs = spec.channels
        for outputs in (width, 2 * width, 2 * width):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            inputs = outputs
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * -(-h // 8) * -(-w // 8), spec.classes))

    return build


class MeanOverImage(nn.Module):
    """Mean over an image: (B, C, H, W) to (B, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, C)."""
        return x.mean((2, 3))


def ds_cnn(width: int) -> Builder:
    """Depthwise separable convolutions of `width` to 4 * `width`, pooled to their mean, one linear layer.

    Few weights for their accuracy: a 3x3 filter per channel, then a mixture of channels, instead of a filter
    per pair of channels (Howard et al. 2017, MobileNets; the DS-CNN of Zhang et al. 2017, Hello Edge). About
    28 * width^2 parameters, whatever the image's size.

    Args:
        width: channels of the first convolution.
    """

    def build(spec: Spec) -> nn.Module:
        _sides(spec, "ds_cnn")
        return nn.Sequential(
            nn.Conv2d(spec.channels, width, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *_separable(width, 2 * width, stride=1),
            *_separable(2 * width, 4 * width, stride=2),
            *_separable(4 * width, 4 * width, stride=1),
            MeanOverImage(),
            nn.Linear(4 * width, spec.classes),
        )

    return build


def _separable(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    """A 3x3 filter per channel and a mixture of channels, each normalised and rectified."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class MeanAndMax(nn.Module):
    """Mean and largest value over time, one after the other: (B, C, T) to (B, 2C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T) to (B, 2C)."""
        return torch.cat([x.mean(2), x.amax(2)], dim=1)


def cnn1d(width: int, hidden: int) -> Builder:
    """Convolutions over time of `width` and 2 * `width` (5 wide), pooled to mean and maximum, dense `hidden`.

    Pooling over all time makes it the same network for any length of window.
    """

    def build(spec: Spec) -> nn.Module:
        if spec.kind != "signal" or spec.shape[0] < 4:
            raise ConfigError(
                f"model.name = 'cnn1d': needs signals of 4 or more in time, not {spec.kind} of {spec.shape}"
            )
        return nn.Sequential(
            nn.Conv1d(spec.channels, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(width, 2 * width, 5, padding=2),
            nn.ReLU(),
            MeanAndMax(),
            nn.Linear(4 * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, spec.classes),
        )

    return build


class Recurrent(nn.Module):
    """A recurrent layer over a signal (B, C, T), or over embedded text (B, T); its last state is classified.

    It starts from zeros that the layer makes, and branches on nothing in the data: clients can be batched.
    """

    def __init__(self, spec: Spec, cell: type[nn.GRU] | type[nn.LSTM], hidden: int, embedding: int) -> None:
        super().__init__()
        text = spec.kind == "text"
        self.embedding = nn.Embedding(spec.classes, embedding) if text else None
        self.layer = cell(embedding if text else spec.channels, hidden, batch_first=True)
        self.head = nn.Linear(hidden, spec.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T) or (B, C, T) to (B, K)."""
        steps = x.transpose(1, 2) if self.embedding is None else self.embedding(x)  # (B, T, C or E)
        states, _ = self.layer(steps)  # (B, T, D)
        logits: torch.Tensor = self.head(states[:, -1])
        return logits


def gru(hidden: int, *, embedding: int = 32) -> Builder:
    """A gated recurrent unit (Cho et al. 2014) of `hidden` units, for signals or text."""
    return _recurrent("gru", nn.GRU, hidden, embedding)


def lstm(hidden: int, *, embedding: int = 32) -> Builder:
    """Long short-term memory (Hochreiter and Schmidhuber 1997) of `hidden` units, for signals or text."""
    return _recurrent("lstm", nn.LSTM, hidden, embedding)


def _recurrent(name: str, cell: type[nn.GRU] | type[nn.LSTM], hidden: int, embedding: int) -> Builder:
    def build(spec: Spec) -> nn.Module:
        if spec.kind not in ("signal", "text"):
            raise ConfigError(f"model.name = {name!r}: needs signals or text, not {spec.kind}")
        return Recurrent(spec, cell, hidden, embedding)

    return build


def _sides(spec: Spec, name: str) -> tuple[int, int]:
    if spec.kind != "image" or min(spec.shape[:2]) < 4:
        raise ConfigError(
            f"model.name = {name!r}: needs images of at least 4x4, not {spec.kind} of shape {spec.shape}"
        )
    return spec.shape[0], spec.shape[1]


def parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters())
