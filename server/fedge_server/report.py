"""`report.html`: one self-contained page about a run, plots inside, readable without a network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedge.config import Config
from fedge.dataset import Dataset, Indices
from fedge.files import write_atomically
from fedge.spec import Spec
from fedge_server.compression import TierOutcome
from fedge_server.rounds.loop import Learned
from fedge_server.rounds.record import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CLIENTS_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled picture and the sentence that says what to see in it."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Holdings:
    """Who holds what: known where one machine deals the data out, and nowhere else."""

    dataset: Dataset
    clients: Sequence[Indices]
    names: Sequence[str]


@dataclass(frozen=True, slots=True)
class Report:
    """What the page shows."""

    config: Config
    summary: dict[str, Any]
    records: Sequence[RoundRecord]
    outcomes: Sequence[TierOutcome]
    plots: tuple[Plot, ...]

    @classmethod
    def of(
        cls,
        config: Config,
        spec: Spec,
        learned: Learned,
        outcomes: Sequence[TierOutcome],
        summary: dict[str, Any],
        holdings: Holdings | None = None,
    ) -> Self:
        """Draw the plots of a run."""
        plots = [_accuracy(learned.records)]
        if holdings is not None:
            plots.append(_partition(holdings.dataset, holdings.clients, holdings.names))
        if recall := learned.records[-1].metrics.get("recall"):
            plots.append(_recall(recall, spec.labels))  # type: ignore[arg-type]  # recall is a list
        if any(trial.accuracy is not None for outcome in outcomes for trial in outcome.tried):
            plots.append(_candidates(outcomes, summary["global_model"]["bytes"]))
        return cls(config, summary, learned.records, outcomes, tuple(plots))


def write_report(path: Path, report: Report) -> None:
    """Render the page and put it in place whole."""
    environment = Environment(
        loader=PackageLoader("fedge_server", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        report=report, options=_flat(report.config.to_mapping())
    )
    write_atomically(path, page.encode())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _draw(title: str, caption: str, paint: Any, *, height: float = 3.2) -> Plot:
    # The object interface, not pyplot: no global state and no display is needed.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedge", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Plot(title, caption, text[text.index("<svg") :])


def _accuracy(records: Sequence[RoundRecord]) -> Plot:
    rounds = [record.round for record in records]

    def paint(axes: Axes) -> None:
        for name in ("accuracy", "macro_f1", "auc"):
            values = [record.metrics.get(name) for record in records]
            if all(isinstance(value, float) for value in values):
                axes.plot(rounds, values, marker="o", markersize=2.5, label=name)  # type: ignore[arg-type]
        axes.set(xlabel="round", ylabel="fraction of 1")
        axes.grid(alpha=0.3)
        other = axes.twinx()
        losses: Any = [record.metrics["loss"] for record in records]
        other.plot(rounds, losses, color="grey", linestyle=":", label="loss")
        other.set_ylabel("loss")
        axes.legend(loc="lower right")

    return _draw(
        "Learning", "The global model on the server's test data after each round (dotted: loss).", paint
    )


def _partition(dataset: Dataset, clients: Sequence[Indices], names: Sequence[str]) -> Plot:
    shown = min(len(clients), MAX_CLIENTS_SHOWN)
    counts = np.array(
        [np.bincount(dataset.y[part], minlength=dataset.spec.classes) for part in clients[:shown]]
    )

    def paint(axes: Axes) -> None:
        image = axes.imshow(counts.T, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(xlabel="client", ylabel="class")
        if shown <= 25:
            axes.set_xticks(range(shown), names[:shown])
        if dataset.spec.classes <= 25:
            axes.set_yticks(range(dataset.spec.classes), dataset.spec.labels)
        axes.figure.colorbar(image, ax=axes, label="training examples")

    more = f" The first {shown} of {len(clients)} clients." if shown < len(clients) else ""
    return _draw("Who holds what", f"Training examples of each class on each client.{more}", paint)


def _recall(recall: Sequence[float], labels: Sequence[str]) -> Plot:
    def paint(axes: Axes) -> None:
        axes.bar(range(len(recall)), recall)
        axes.set(ylabel="recall", ylim=(0, 1))
        if len(labels) <= 25:
            axes.set_xticks(range(len(labels)), labels)

    return _draw(
        "Per class",
        "Share of each class's test examples that the global model recognises.",
        paint,
        height=2.4,
    )


def _candidates(outcomes: Sequence[TierOutcome], teacher_bytes: int) -> Plot:
    """All candidates that were built, and which tier took which."""
    points = {
        trial.recipe: (trial.wire_bytes, trial.accuracy)
        for outcome in outcomes
        for trial in outcome.tried
        if trial.wire_bytes is not None and trial.accuracy is not None
    }
    taken: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.variant is not None:
            taken.setdefault(outcome.variant.recipe, []).append(outcome.tier)

    def paint(axes: Axes) -> None:
        for recipe, (size, accuracy) in points.items():
            chosen = recipe in taken
            label = f" {recipe}" + (f" \u2190 {', '.join(taken[recipe])}" if chosen else "")
            axes.plot(size, accuracy, "o", color="tab:green" if chosen else "lightgrey")
            axes.annotate(label, (size, accuracy), fontsize=8, weight="bold" if chosen else "normal")
        axes.axvline(teacher_bytes, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel="bytes on the wire (dotted: the global model)", ylabel="accuracy")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.3)

    caption = (
        "Every candidate on the selection data; green: taken by a tier, after passing its gate on other data."
    )
    return _draw("Candidates", caption, paint, height=3.6)
