"""What a global model answers to the server's test data, and what that is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedge.config import Config, Target
from fedge.dataset import Examples
from fedge.errors import RoundError
from fedge.learning import local
from fedge.learning.metrics import evaluate
from fedge.learning.whole import WholeModel
from fedge_server.data import ServerData
from fedge_server.evaluation.intervals import Answered, interval
from fedge_server.rounds.record import Metric

Answers = npt.NDArray[np.float32]

PIECE = 2**20  # elements looked at together


def is_finite(value: npt.NDArray[np.generic]) -> bool:
    """Whether all values are; in pieces, since numpy's answer is an array of its own."""
    flat = value.reshape(-1)
    return all(np.isfinite(flat[i : i + PIECE]).all() for i in range(0, len(flat), PIECE))


def probabilities_of(model: WholeModel, examples: Examples) -> Answers:
    """The model's answers (N, K) to raw examples."""
    raw = torch.from_numpy(np.ascontiguousarray(examples.x))
    answers: Answers = local.logits(model, raw).softmax(1).numpy()
    return answers


def score(answers: Answers, data: ServerData, config: Config) -> dict[str, Metric]:
    """Metrics of a model's answers (N, K) to the server's test data.

    Raises:
        RoundError: they are not finite, which only those of the initial model can be.
    """
    if not np.isfinite(answers).all():
        raise RoundError("the initial model answers NaN; check the data's scale and the clients' moments")
    return evaluate(answers, data.test.y, config.evaluate.metrics)


@dataclass(frozen=True, slots=True)
class Sureness:
    """How sure the metric is that decides when to stop."""

    intervals: dict[
        str, tuple[float, float]
    ]  # of that metric alone: those of all metrics cost more than a round
    target_bound: float | None = None  # its one-sided bound, with rounds.target_confidence


def sureness(answers: Answers, data: ServerData, config: Config) -> Sureness:
    """The interval of the target's metric, or of the accuracy, over the server's test data."""
    settings, rounds = config.evaluate, config.rounds
    target = Target("accuracy", True, 1.0) if rounds.target is None else Target.parse(rounds.target)
    answered = Answered.of(answers, data.test.y, data.test_owners)

    def at(tail: float) -> tuple[float, float] | None:
        found = interval(target.metric, answered, tail=tail, resamples=settings.resamples, seed=config.seed)
        return None if found is None else (found.low, found.high)

    both = at((1 - settings.confidence) / 2)
    one = None if rounds.target_confidence is None else at(1 - rounds.target_confidence)
    bound = None if one is None else one[0 if target.at_least else 1]
    return Sureness({} if both is None else {target.metric: both}, bound)
