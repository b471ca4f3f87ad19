"""The built-in architectures, and scaled-down students of the same families.

Legend: B batch, C channels, H W image sides, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

from torch import nn

from fedge.errors import ConfigError
from fedge.spec import Spec

Builder = Callable[[Spec], nn.Module]


def _features(spec: Spec) -> int:
    return prod(spec.shape)


def logistic(spec: Spec) -> nn.Module:
    """Multinomial logistic regression: one linear layer, F * K + K parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_features(spec), spec.classes))


def mlp(*hidden: int) -> Builder:
    """A multi-layer perceptron with ReLU; 200 and 200 hidden units make McMahan's 2NN, 199,210 on 28x28.

    McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data.
    """

    def build(spec: Spec) -> nn.Module:
        sizes = (_features(spec), *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
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
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (h // 4) * (w // 4), 512),
        nn.ReLU(),
        nn.Linear(512, spec.classes),
    )


def small_cnn(width: int, hidden: int) -> Builder:
    """A student of the CNN's family: 3x3 convolutions of `width` and 2 * `width`, strided, dense `hidden`."""

    def build(spec: Spec) -> nn.Module:
        h, w = _sides(spec, "small_cnn")
        return nn.Sequential(
            nn.Conv2d(spec.channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * -(-h // 4) * -(-w // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, spec.classes),
        )

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
