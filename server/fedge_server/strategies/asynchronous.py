"""Rounds without waiting: a step of the global model as soon as a few updates are there, however old.

FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639):
K updates make a step, each the change of a client since the model that it began with,

    w <- w + eta_g / K sum_k s(tau_k) (w_k - w_start,k).

FedAsync (Xie et al. 2019, "Asynchronous Federated Optimization", arXiv:1903.03934): each answer is mixed in,

    w <- (1 - a s(tau)) w + a s(tau) w_k.

tau, the staleness, counts the steps since the model that the client began with. Both are a mean of updates
that were moved to where the global model stands now; who is at work, and from what, knows
`rounds.asynchronous`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedge_server.strategies.fedavg import FedAvg

Values = npt.NDArray[Any]
DISCOUNTS: Final = ("polynomial", "hinge", "constant")
HINGE_SLOPE, HINGE_AFTER = 10.0, 4  # Xie et al. 2019, section 5
WEIGHTINGS: Final = ("clients", "examples")


class Asynchronous(FedAvg):
    """What both have in common: how much an old update counts, and how many make a step."""

    def __init__(
        self,
        buffer: int,
        staleness: str,
        exponent: float,
        max_staleness: int,
        weighting: str,
        **kwargs: Any,
    ) -> None:
        """Set the discount.

        Args:
            buffer: K, updates that make a step, from 1.
            staleness: 'polynomial', s = (1 + tau)^-exponent; 'hinge', 1 up to 4 steps and 1 / (10 (tau - 4) +
                1) beyond; 'constant', 1.
            exponent: of 'polynomial', from 0.
            max_staleness: an older update is rejected; so many models are kept, from 0.
            weighting: 'clients', each alike; or 'examples', as in FedAvg.
            kwargs: FedAvg's own.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__(**kwargs)
        if type(buffer) is not int or buffer < 1 or type(max_staleness) is not int or max_staleness < 0:
            raise ValueError(
                f"buffer {buffer} must be a whole number from 1, max_staleness {max_staleness} from 0"
            )
        if staleness not in DISCOUNTS or not exponent >= 0 or weighting not in WEIGHTINGS:
            raise ValueError(
                f"staleness {staleness!r} must be one of {', '.join(DISCOUNTS)}, exponent {exponent} from 0, "
                f"weighting {weighting!r} one of {', '.join(WEIGHTINGS)}"
            )
        self.buffer, self.max_staleness = buffer, max_staleness
        self.staleness, self.exponent, self.weighting = staleness, float(exponent), weighting

    def discount(self, tau: int) -> float:
        """s(tau), above 0, at most 1."""
        if self.staleness == "polynomial":
            return float((1 + tau) ** -self.exponent)
        if self.staleness == "hinge" and tau > HINGE_AFTER:
            return 1 / (HINGE_SLOPE * (tau - HINGE_AFTER) + 1)
        return 1.0

    def moved(self, now: Values, start: Values, trained: Values, tau: int) -> Values:
        """What one array of an update stands for, now that the global model is elsewhere.

        Args:
            now: of the global model.
            start: that the client began with.
            trained: that it has sent.
            tau: its staleness.
        """
        raise NotImplementedError


class FedBuff(Asynchronous):
    """Buffered changes (Nguyen et al. 2022)."""

    def __init__(
        self,
        buffer: int = 10,
        server_learning_rate: float = 1.0,
        staleness: str = "polynomial",
        exponent: float = 0.5,
        max_staleness: int = 20,
        weighting: str = "clients",
        **kwargs: Any,
    ) -> None:
        """As `Asynchronous`; server_learning_rate: eta_g, above 0."""
        super().__init__(buffer, staleness, exponent, max_staleness, weighting, **kwargs)
        if not server_learning_rate > 0:
            raise ValueError(f"server_learning_rate {server_learning_rate} must be above 0")
        self.server_learning_rate = float(server_learning_rate)

    def moved(self, now: Values, start: Values, trained: Values, tau: int) -> Values:
        """The global model, with the client's own change on top."""
        factor = np.asarray(self.server_learning_rate * self.discount(tau), now.dtype)
        return np.asarray(now + factor * (trained - start))


class FedAsync(Asynchronous):
    """Each answer at once (Xie et al. 2019)."""

    def __init__(
        self,
        mixing: float = 0.6,
        staleness: str = "polynomial",
        exponent: float = 0.5,
        max_staleness: int = 20,
        proximal_mu: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """As `Asynchronous`, with a buffer of one.

        Args:
            mixing: a, above 0, at most 1.
            staleness: as in `Asynchronous`.
            exponent: likewise.
            max_staleness: likewise.
            proximal_mu: rho, which holds a client near the model that it began with, from 0.
            kwargs: FedAvg's own.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__(1, staleness, exponent, max_staleness, "clients", **kwargs)
        if not 0 < mixing <= 1 or not proximal_mu >= 0:
            raise ValueError(
                f"mixing {mixing} must be above 0, at most 1, and proximal_mu {proximal_mu} from 0"
            )
        self.mixing, self.proximal_mu = float(mixing), float(proximal_mu)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell clients of the proximal term too."""
        if self.proximal_mu:
            config["proximal-mu"] = self.proximal_mu
        return super().configure_train(server_round, arrays, config, grid)

    def moved(self, now: Values, start: Values, trained: Values, tau: int) -> Values:
        """A part of the way from the global model to the client's."""
        factor = np.asarray(self.mixing * self.discount(tau), now.dtype)
        return np.asarray(now + factor * (trained - now))
