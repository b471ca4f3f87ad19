"""How a global model serves the clients, by what each of them measured on its own data.

The mean by examples, which a strategy gives, hides whom the model fails. Here each client counts once: the
mean of the worst tenth, the least, and the variance of the clients' accuracies (as Li et al. 2020, Fair
Resource Allocation in Federated Learning, report them), with an interval over clients as drawn from all that
there could be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedge.config import Config
from fedge.learning.messages import HELD_OUT, METRICS
from fedge.wire.arrays import records_of
from fedge_server.evaluation.bootstrap import MIN_UNITS, mean_interval
from fedge_server.rounds.validation import evaluation_fault

_STREAM: Final = 0xFA12


def collect_evaluations(replies: Iterable[Message], asked: set[int], *, held_out: bool) -> list[Message]:
    """The evaluations that may be averaged: one of each client that was asked, in the clients' order.

    Args:
        replies: as they come; the first that a client sends counts.
        asked: node ids.
        held_out: clients were told to evaluate on what they keep back; one that does not say so is left out.
    """
    valid: dict[int, Message] = {}
    for reply in replies:
        client = reply.metadata.src_node_id
        if client in asked and client not in valid and evaluation_fault(reply, held_out=held_out) is None:
            _metrics(reply).pop(HELD_OUT, None)  # a mark, and nothing to be averaged
            valid[client] = reply
    return [valid[client] for client in sorted(valid)]


def _metrics(reply: Message) -> MetricRecord:
    return records_of(reply.content, MetricRecord)[METRICS]


def across_clients(
    accuracies: Sequence[float], *, confidence: float, resamples: int, seed: int
) -> dict[str, float]:
    """Figures of the clients' accuracies, in an order that does not matter.

    Args:
        accuracies: one for each client, at least one.
        confidence: of the interval of their mean, two-sided.
        resamples: of clients, at least.
        seed: decides the draws.
    """
    values = np.sort(np.asarray(accuracies, dtype=np.float64))
    n = len(values)
    found = {
        "clients": float(n),
        "accuracy_mean": float(values.mean()),
        "accuracy_min": float(values[0]),
        "accuracy_worst_decile": float(values[: math.ceil(n / 10)].mean()),
    }
    if n > 1:
        found["accuracy_variance"] = float(values.var(ddof=1))
    if n < MIN_UNITS:
        return found
    rng = np.random.default_rng([seed, _STREAM])
    interval = mean_interval(values, tail=(1 - confidence) / 2, resamples=resamples, rng=rng)
    return {**found, "accuracy_low": interval.low, "accuracy_high": interval.high}


def on_clients(
    strategy: Strategy, number: int, replies: Iterable[Message], asked: set[int], config: Config
) -> dict[str, float]:
    """What evaluations say: means over examples, as the strategy takes them, and figures over clients.

    Args:
        strategy: of the run.
        number: of the round.
        replies: as they come.
        asked: node ids.
        config: of the run.
    """
    settings = config.evaluate
    valid = collect_evaluations(replies, asked, held_out=settings.client_holdout > 0)
    if not valid:
        return {"clients": 0.0, "asked": float(len(asked))}
    accuracies = [float(_metrics(reply)["accuracy"]) for reply in valid]  # type: ignore[arg-type]  # numbers
    over = across_clients(
        accuracies, confidence=settings.confidence, resamples=settings.resamples, seed=config.seed
    )
    means = strategy.aggregate_evaluate(number, valid)
    scalars = {key: value for key, value in (means or {}).items() if isinstance(value, float)}
    return {**scalars, **over, "asked": float(len(asked))}
