"""How often intervals at 95 % hold the truth, and how often noise stops a run that still learns.

coverage  accuracy over examples, accuracy over clients that differ, loss, AUC: on simulated answers
stopping  patience on curves that rise or are flat, with and without `rounds.smooth`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from _harness import Row, machine, options, publish
from scipy.stats import norm

from fedge.config import Rounds
from fedge_server.evaluation.intervals import Answered, interval
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.stopping import why_stop

PARTS: Final = ("coverage", "stopping")

Array = npt.NDArray[Any]
Draw = Callable[[np.random.Generator], Answered]


def answered(right: Array, owners: Array | None = None) -> Answered:
    """Two classes, all examples of the first, answered rightly or not."""
    probabilities = np.where(right.ravel()[:, None], [1.0, 0.0], [0.0, 1.0])
    return Answered.of(probabilities, np.zeros(right.size, np.int64), owners)


def of_examples(n: int, p: float) -> Draw:
    """N examples, each right with probability p."""
    return lambda rng: answered(rng.random(n) < p)


def of_clients(clients: int, examples: int, *, known: bool = True) -> Draw:
    """Clients whose accuracies are drawn around 0.8, with a deviation of 0.12."""
    owners = np.repeat(np.arange(clients), examples) if known else None

    def draw(rng: np.random.Generator) -> Answered:
        own = rng.beta(8, 2, clients)
        return answered(rng.random((clients, examples)) < own[:, None], owners)

    return draw


def exponential_losses(rng: np.random.Generator) -> Answered:
    """100 losses with the mean 1."""
    chosen = np.exp(-rng.exponential(1, 100))
    return Answered.of(np.stack([chosen, 1 - chosen], 1), np.zeros(100, np.int64), None)


def shifted_scores(rng: np.random.Generator) -> Answered:
    """80 negative and 40 positive examples, whose scores are a deviation higher."""
    y = np.repeat([0, 1], [80, 40])
    scores = norm.cdf(rng.normal(size=120) + y)
    return Answered.of(np.stack([1 - scores, scores], 1), y, None)


def coverage(samples: int) -> list[Row]:
    """How many of so many intervals at 95 % hold the truth."""
    cases: list[tuple[str, str, Draw, float]] = [
        *(
            (f"accuracy {p} over {n} examples", "accuracy", of_examples(n, p), p)
            for n, p in ((50, 0.9), (100, 0.8), (200, 0.95), (500, 0.9), (1000, 0.97))
        ),
        *(
            (f"accuracy 0.8 over {k} clients of {m}", "accuracy", of_clients(k, m), 0.8)
            for k, m in ((10, 20), (20, 20), (40, 10))
        ),
        ("the same 20 clients, over examples", "accuracy", of_clients(20, 20, known=False), 0.8),
        ("loss 1 over 100 examples", "loss", exponential_losses, 1.0),
        ("AUC 0.76 over 120 examples", "auc", shifted_scores, float(norm.cdf(1 / np.sqrt(2)))),
    ]
    rows: list[Row] = []
    for name, metric, draw, truth in cases:
        rng, held = np.random.default_rng(1), 0
        for seed in range(samples):
            found = interval(metric, draw(rng), tail=0.025, resamples=1000, seed=seed)
            held += found is not None and found.low <= truth <= found.high
        rows.append({"what": name, "samples": samples, "figure": held / samples})
    return rows


def stopping(curves: int) -> list[Row]:
    """With patience 4: rising curves of 30 rounds that are stopped, and rounds until flat ones are."""
    rows: list[Row] = []
    for smooth in (1, 2, 4, 8):
        settings = Rounds(count=999, patience=4, smooth=smooth)
        for slope in (0.002, 0.004, 0.008):
            ended = sum(_ends(seed, slope, 30, settings) is not None for seed in range(curves))
            rows.append(
                {"what": f"rise {slope} a round, smooth {smooth}: stopped", "samples": curves,
                 "figure": ended / curves}
            )  # fmt: skip
        lengths = [_ends(seed, 0.0, 200, settings) or 200 for seed in range(curves)]
        rows.append(
            {"what": f"flat, smooth {smooth}: rounds", "samples": curves, "figure": float(np.mean(lengths))}
        )
    return rows


def _ends(seed: int, slope: float, rounds: int, settings: Rounds) -> int | None:
    """After how many rounds a curve with a deviation of 0.01 around its rise is stopped."""
    values = 0.5 + slope * np.arange(rounds) + np.random.default_rng(seed).normal(0, 0.01, rounds)
    records = [RoundRecord(i, {"accuracy": float(value)}) for i, value in enumerate(values)]
    return next((n for n in range(1, rounds + 1) if why_stop(records[:n], settings)), None)


def main() -> None:
    """Measure what is asked for."""
    asked = options(str(__doc__), parts=PARTS)
    before, rows, claims = machine(), list[Row](), dict[str, float]()
    if not asked.only or "coverage" in asked.only:
        found = coverage(100 if asked.quick else 1000)
        claims["coverage_accuracy_500"] = float(found[3]["figure"])
        claims["coverage_clients_20"] = float(found[6]["figure"])
        rows += found
    if not asked.only or "stopping" in asked.only:
        rows += stopping(50 if asked.quick else 200)
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main()
