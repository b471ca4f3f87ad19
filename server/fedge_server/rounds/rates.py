"""`train.schedule`: how the clients' learning rate changes from round to round."""

from __future__ import annotations

import math

from fedge.config import Config


def learning_rate(number: int, config: Config) -> float:
    """That clients train with in a round.

    "cosine" is eta_r = eta / 2 (1 + cos(pi (r - 1) / R)) of R rounds (Loshchilov and Hutter 2017, "SGDR:
    Stochastic Gradient Descent with Warm Restarts", arXiv:1608.03983, equation 5 without a restart): clients
    whose steps stay large never agree on more than the neighbourhood of an optimum.

    Args:
        number: of the round, 1 to R.
        config: of the run; R is its `rounds.count`, whichever round a stopping rule ends it in.
    """
    full = config.train.learning_rate
    if config.train.schedule == "constant":
        return full
    return full / 2 * (1 + math.cos(math.pi * (number - 1) / config.rounds.count))
