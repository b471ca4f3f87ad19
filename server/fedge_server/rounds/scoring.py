"""What a global model answers to the server's test data, and what that is worth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import RoundError
from fedge.learning import local
from fedge.learning.metrics import evaluate
from fedge.learning.whole import WholeModel
from fedge_server.data import ServerData
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
