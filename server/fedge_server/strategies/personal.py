"""Personalisation: part of the model, or a model beside it, stays on each device.

- FedPer (Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", arXiv:1912.00818):
  the last layers are each client's own; the others are averaged.
- FedBN (Li et al. 2021, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization",
  arXiv:2102.07623): batch normalisation, parameters and statistics, is each client's own.
- Ditto (Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
  arXiv:2012.04221): FedAvg, and beside it each client trains a model of its own for
  F_k(v) + lambda / 2 |v - w|^2, w being the global model that it was sent.

What is a client's own it evaluates with. The server has no such part: there it stays as it was at first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedge.learning.terms import Terms
from fedge_server.strategies.fedavg import FedAvg


class FedPer(FedAvg):
    """FedAvg over the base; the head stays on the device."""

    def __init__(self, network: nn.Module, layers: int = 1, modules: str = "", **kwargs: Any) -> None:
        """Choose the head.

        Args:
            network: the global model.
            layers: so many of its last modules that have parameters, at least 1.
            modules: names of modules instead, with commas between them.
            kwargs: FedAvg's own.

        Raises:
            ValueError: there are no such modules, or nothing would be left to learn together.
        """
        super().__init__(**kwargs)
        self.own = _entries(network, _named(network, modules) if modules else _last(network, layers))

    @property
    def terms(self) -> Terms:
        """What stays."""
        return Terms(own=self.own)


class FedBn(FedAvg):
    """FedAvg over all but batch normalisation."""

    def __init__(self, network: nn.Module, **kwargs: Any) -> None:
        """Find batch normalisation.

        Args:
            network: the global model.
            kwargs: FedAvg's own.

        Raises:
            ValueError: it has none.
        """
        super().__init__(**kwargs)
        norms = {
            name for name, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        if not norms:
            raise ValueError("the model has no batch normalisation; take 'fedavg' or 'fedper'")
        self.own = _entries(network, norms)

    @property
    def terms(self) -> Terms:
        """What stays."""
        return Terms(own=self.own)


class Ditto(FedAvg):
    """FedAvg, and a personal model on each device."""

    def __init__(self, pull: float = 0.1, **kwargs: Any) -> None:
        """Set how far personal models may go.

        Args:
            pull: lambda, above 0.
            kwargs: FedAvg's own.

        Raises:
            ValueError: it is not above 0.
        """
        super().__init__(**kwargs)
        if not pull > 0:
            raise ValueError(f"pull {pull} must be above 0; it is the lambda of the paper")
        self.pull = float(pull)

    @property
    def terms(self) -> Terms:
        """A model that stays."""
        return Terms(pull=self.pull)


def _last(network: nn.Module, layers: int) -> set[str]:
    with_parameters = [
        name for name, m in network.named_modules() if any(True for _ in m.parameters(recurse=False))
    ]
    if not 1 <= layers < len(with_parameters):
        raise ValueError(f"layers {layers} must be from 1 to {len(with_parameters) - 1} of this model")
    return set(with_parameters[-layers:])


def _named(network: nn.Module, modules: str) -> set[str]:
    wanted = {name.strip() for name in modules.split(",")}
    known = {name for name, _ in network.named_modules() if name}
    if not wanted <= known:
        raise ValueError(
            f"modules {sorted(wanted - known)} are not of this model; it has {', '.join(sorted(known))}"
        )
    return wanted


def _entries(network: nn.Module, modules: set[str]) -> tuple[str, ...]:
    """What of the state belongs to these modules, and would travel elsewhere."""
    own = tuple(
        name
        for name, value in network.state_dict().items()
        if value.is_floating_point() and any(name.startswith(f"{module}.") for module in modules)
    )
    if all(name in own for name, _ in network.named_parameters()):
        raise ValueError("nothing would be left that clients learn together")
    return own
