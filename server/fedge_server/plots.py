"""The pictures in a run's report: how it learned, what it cost, who held what, what was tried for tiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedge.dataset import Dataset, Indices
from fedge_server.compression import TierOutcome
from fedge_server.page import Plot, draw
from fedge_server.rounds.record import THRESHOLD, RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CLIENTS_SHOWN = 60  # one by one; of more, what is shown is how they are distributed
MAX_CLIENTS_LOOKED_AT = 1000  # a population may be a million clients whose data is dealt out when asked for
_ALL_NAMED = 8  # candidates; of more, those that matter
_MARKED = 60  # rounds; a line of more has no marks


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who holds what: known where one machine deals the data out, and nowhere else."""

    dataset: Dataset
    clients: Sequence[Indices]  # may be lazy: only some are looked at
    names: Sequence[str]


def learning(records: Sequence[RoundRecord]) -> Plot:
    """Metrics and loss by round."""
    rounds = [record.round for record in records]

    def paint(axes: Axes) -> None:
        for name in ("accuracy", "macro_f1", "auc"):
            values = [record.metrics.get(name) for record in records]
            if all(isinstance(value, float) for value in values):
                axes.plot(rounds, values, label=name, **_line(len(rounds)))  # type: ignore[arg-type]
        axes.set(xlabel="round", ylabel="fraction of 1")
        axes.grid(alpha=0.3)
        other = axes.twinx()
        losses: Any = [record.metrics["loss"] for record in records]
        other.plot(rounds, losses, color="grey", linestyle=":", label="loss")
        other.set_ylabel("loss")
        axes.legend(loc="lower right")

    return draw(
        "Learning", "The global model on the server's test data after each round (dotted: loss).", paint
    )


def speed(records: Sequence[RoundRecord]) -> Plot:
    """Clients per second by round, and the simulated clock where there is one."""
    rounds = [record.round for record in records]
    clocks = [record.simulated_s for record in records]

    def paint(axes: Axes) -> None:
        rates = [record.clients / record.seconds if record.seconds else 0.0 for record in records]
        axes.plot(rounds, rates, **_line(len(rounds)))
        axes.set(xlabel="round", ylabel="clients per second", ylim=(0, None))
        axes.grid(alpha=0.3)
        if all(clocks):
            other = axes.twinx()
            other.plot(rounds, clocks, color="grey", linestyle=":")  # type: ignore[arg-type]  # none is None
            other.set_ylabel("simulated seconds so far")

    dotted = " (dotted: the simulated clock)" if all(clocks) else ""
    return draw(
        "Speed", f"Updates aggregated in a round over its wall time, evaluation included{dotted}.", paint,
        height=2.4,
    )  # fmt: skip


def traffic(records: Sequence[RoundRecord]) -> Plot:
    """Bytes up and down by round."""
    rounds = [record.round for record in records]

    def paint(axes: Axes) -> None:
        for name, values in (
            ("up, from the clients", [record.bytes_up / 1e6 for record in records]),
            ("down, to the clients", [record.bytes_down / 1e6 for record in records]),
        ):
            axes.plot(rounds, values, label=name, **_line(len(rounds)))
        axes.set(xlabel="round", ylabel="MB", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()

    total = sum(record.bytes_up + record.bytes_down for record in records) / 1e6
    return draw(
        "Traffic", f"Models sent and received in each round; {total:,.1f} MB in all.", paint, height=2.4
    )


def answers(records: Sequence[RoundRecord]) -> Plot:
    """Clients asked and updates used, by round."""
    rounds = [record.round for record in records]

    def paint(axes: Axes) -> None:
        axes.fill_between(rounds, [record.asked for record in records], color="lightgrey", label="asked")
        axes.fill_between(rounds, [record.clients for record in records], color="tab:blue", label="used")
        axes.set(xlabel="round", ylabel="clients", ylim=(0, None))
        axes.legend(loc="lower right")

    return draw("Answers", "Clients asked in each round, and updates that were used.", paint, height=2.0)


def anomalies(records: Sequence[RoundRecord], clients: Sequence[int]) -> Plot:
    """How much updates stood out by round: all of them as dots, some clients as lines."""
    points = [(record.round, score.value) for record in records for score in record.anomalies]

    def paint(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), ".", color="lightgrey", markersize=3)
        for client in clients:
            own = [(r.round, s.value) for r in records for s in r.anomalies if s.client == client]
            axes.plot(*zip(*own, strict=True), label=f"client {client}", **_line(len(own)))
        axes.axhline(THRESHOLD, color="grey", linestyle=":")
        axes.set(xlabel="round", ylabel="robust deviations", yscale="symlog")
        axes.legend(fontsize=7)

    return draw(
        "Who stands out",
        f"How far each update lies from the others of its round; lines: the clients with the largest means. "
        f"Dotted: {THRESHOLD:g}, from which on one should look. Honest clients with rare data stand out too.",
        paint,
        height=2.8,
    )


def holdings(held: Holdings) -> list[Plot]:
    """Who holds what: each client where they are few, else distributions over some of them."""
    if len(held.clients) <= MAX_CLIENTS_SHOWN:
        return [_each_client(held)]
    return [_sizes(held), _skew(held)]


def _each_client(held: Holdings) -> Plot:
    dataset, shown = held.dataset, len(held.clients)
    counts = np.array([_per_class(held, i) for i in range(shown)])

    def paint(axes: Axes) -> None:
        image = axes.imshow(counts.T, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(xlabel="client", ylabel="class")
        if shown <= 25:
            axes.set_xticks(range(shown), [held.names[i] for i in range(shown)])
        if dataset.spec.classes <= 25:
            axes.set_yticks(range(dataset.spec.classes), dataset.spec.labels)
        axes.figure.colorbar(image, ax=axes, label="training examples")

    return draw("Who holds what", "Training examples of each class on each client.", paint)


def _sizes(held: Holdings) -> Plot:
    chosen = _looked_at(held)
    sizes = np.array([len(held.clients[i]) for i in chosen])

    def paint(axes: Axes) -> None:
        axes.hist(sizes, bins=min(40, int(sizes.max() - sizes.min()) + 1))
        axes.set(xlabel="training examples of a client", ylabel="clients")

    middle = f"median {np.median(sizes):,.0f}"
    caption = f"{_of_all(held, chosen)}: {sizes.min():,} to {sizes.max():,} examples, {middle}."
    if sizes.min() == sizes.max():
        caption = f"{_of_all(held, chosen)}: {sizes.min():,} examples each."
    return draw("Sizes of the clients", caption, paint, height=2.4)


def _skew(held: Holdings) -> Plot:
    chosen = _looked_at(held)
    counts = [_per_class(held, i) for i in chosen]
    shares = [float(count.max() / count.sum()) for count in counts if count.sum()]

    def paint(axes: Axes) -> None:
        axes.hist(shares, bins=25, range=(0, 1))
        axes.set(xlabel="share of a client's most frequent class", ylabel="clients")

    caption = (
        f"{_of_all(held, chosen)}. Where clients are alike, all stand at the share of the most frequent "
        "class in the data set; clients with a single class stand at 1."
    )
    return draw("How unlike the clients are", caption, paint, height=2.4)


def _per_class(held: Holdings, client: int) -> npt.NDArray[np.intp]:
    return np.bincount(held.dataset.y[held.clients[client]], minlength=held.dataset.spec.classes)


def _looked_at(held: Holdings) -> list[int]:
    """Clients at even distances, at most MAX_CLIENTS_LOOKED_AT of them."""
    count = len(held.clients)
    return [i * count // min(count, MAX_CLIENTS_LOOKED_AT) for i in range(min(count, MAX_CLIENTS_LOOKED_AT))]


def _of_all(held: Holdings, chosen: Sequence[int]) -> str:
    count = len(held.clients)
    return f"All {count:,} clients" if len(chosen) == count else f"{len(chosen):,} of {count:,} clients"


def _line(rounds: int) -> dict[str, Any]:
    return {"marker": "o" if rounds <= _MARKED else "", "markersize": 2.5}


def per_class(recall: Sequence[float], labels: Sequence[str]) -> Plot:
    """Recall of each class."""

    def paint(axes: Axes) -> None:
        axes.bar(range(len(recall)), recall)
        axes.set(ylabel="recall", ylim=(0, 1))
        if len(labels) <= 25:
            axes.set_xticks(range(len(labels)), labels)

    return draw(
        "Per class",
        "Share of each class's test examples that the global model recognises.",
        paint,
        height=2.4,
    )


def candidates(outcomes: Sequence[TierOutcome], teacher_bytes: int) -> Plot:
    """All candidates that were built, those that no other beats, and which tier took which."""
    points: dict[str, tuple[int, float]] = {}
    front: set[str] = set()
    for trial in (trial for outcome in outcomes for trial in outcome.tried):
        if trial.wire_bytes is not None and trial.accuracy is not None:
            points[trial.recipe] = (trial.wire_bytes, trial.accuracy)
            front.update({trial.recipe} if trial.on_front else set())
    taken: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.variant is not None:
            taken.setdefault(outcome.variant.recipe, []).append(outcome.tier)

    def paint(axes: Axes) -> None:
        for recipe, (size, accuracy) in points.items():
            chosen = recipe in taken
            colour = "tab:green" if chosen else "tab:blue" if recipe in front else "lightgrey"
            axes.plot(size, accuracy, "o", color=colour)
            if chosen or recipe in front or len(points) <= _ALL_NAMED:
                label = f" {recipe}" + (f" \u2190 {', '.join(taken[recipe])}" if chosen else "")
                axes.annotate(label, (size, accuracy), fontsize=8, weight="bold" if chosen else "normal")
        axes.axvline(teacher_bytes, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="bytes on the wire (dotted: the global model)", ylabel="accuracy")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)

    caption = (
        "Every candidate on the selection data. Green: taken by a tier, after passing its gate on other "
        "data; blue: no other is as small, fast and accurate."
    )
    return draw("Candidates", caption, paint, height=3.6)
