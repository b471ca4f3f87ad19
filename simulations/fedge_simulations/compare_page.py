"""A comparison as a table of texts, and as a page with plots that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedge.errors import UserError
from fedge_server.page import Plot, draw, write_page
from fedge_simulations.compare import Comparison, Difference, Group, scalar, simulated_s
from fedge_simulations.runs import Past
from fedge_simulations.statistics import CONFIDENCE, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_DRAWN: Final = 20  # groups in one picture, which has so many colours

Along = Callable[[Past], Sequence[float]]
"""Where the rounds of a run stand on an axis."""


def columns(comparison: Comparison) -> list[str]:
    """Heads of the table."""
    figures = [f"final {comparison.metric}", f"best {comparison.metric}"]
    target = [f"rounds to {comparison.target}"] if comparison.target else []
    clock = ["simulated s"] if _has_clock(comparison) else []
    return ["group", "n", *figures, *target, "rounds", "seconds", *clock, "MB"]


def row(comparison: Comparison, group: Group) -> list[str]:
    """A group's line in the table."""
    figures = group.figures
    target = [_target(group)] if comparison.target else []
    clock = []
    if _has_clock(comparison):
        clock = [written(figures["simulated_s"], 1)] if "simulated_s" in figures else [""]
    return [
        group.label,
        str(len(group.runs)),
        written(figures["final"], 4) + _bracketed(group),
        written(figures["best"], 4),
        *target,
        counted(figures["rounds"]),
        written(figures["seconds"], 2),
        *clock,
        _megabytes(figures["bytes"]),
    ]


def difference_row(difference: Difference) -> list[str]:
    """A difference as group, figure and number of seeds."""
    return [difference.label, written(difference.difference, 4, sign="+"), str(difference.difference.n)]


def written(figure: Estimate, digits: int, *, unit: float = 1.0, sign: str = "") -> str:
    """A mean with its interval; without one where a single run gives none."""
    mean = f"{figure.mean / unit:{sign},.{digits}f}"
    return mean if figure.half_width is None else f"{mean} \u00b1 {figure.half_width / unit:,.{digits}f}"


def _bracketed(group: Group) -> str:
    return "" if group.interval is None else " [{:.4f}, {:.4f}]".format(*group.interval)


def counted(figure: Estimate) -> str:
    """A mean of counts: a whole number where all are alike."""
    return f"{figure.mean:,.0f}" if not figure.half_width else written(figure, 1)


def _megabytes(figure: Estimate) -> str:
    alike = Estimate(figure.mean, None, figure.n) if not figure.half_width else figure
    return written(alike, 2, unit=1e6)


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the page.

    Raises:
        UserError: there is no place for it.
    """
    values = {
        "c": comparison,
        "confidence": CONFIDENCE,
        "runs": sum(len(group.runs) for group in comparison.groups),
        "columns": columns(comparison),
        "rows": [row(comparison, group) for group in comparison.groups],
        "differences": [difference_row(difference) for difference in comparison.differences],
        "plots": _plots(comparison),
    }
    try:
        write_page(path, "fedge_simulations", "compare.html.j2", **values)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _target(group: Group) -> str:
    if "rounds_to_target" in group.figures:
        return counted(group.figures["rounds_to_target"])
    return f"{group.reached} of {len(group.runs)} reached it"


def _has_clock(comparison: Comparison) -> bool:
    return any("simulated_s" in group.figures for group in comparison.groups)


def _plots(comparison: Comparison) -> list[Plot]:
    found = [_by_round(comparison)]
    groups = _drawn(comparison)
    many = f" The first {len(groups)} groups." if len(groups) < len(comparison.groups) else ""

    def megabytes(past: Past) -> list[float]:
        return _sums([(record.bytes_up + record.bytes_down) / 1e6 for record in past.records])

    found.append(
        _along(comparison, groups, "Against traffic", f"One line per run.{many}", "MB so far", megabytes)
    )
    if all(simulated_s(past) is not None for group in groups for past in group.runs):

        def clock(past: Past) -> list[float]:
            return [record.simulated_s or 0.0 for record in past.records]

        text = f"One line per run.{many}"
        found.append(_along(comparison, groups, "Against simulated time", text, "simulated seconds", clock))
    return found


def _drawn(comparison: Comparison) -> tuple[Group, ...]:
    return comparison.groups[:_MAX_DRAWN]


def _by_round(comparison: Comparison) -> Plot:
    groups = _drawn(comparison)

    def paint(axes: Axes) -> None:
        for colour, group in zip(_colours(groups), groups, strict=True):
            rounds = range(1, len(group.curve) + 1)
            axes.plot(rounds, [point.mean for point in group.curve], color=colour, label=_name(group))
            if len(group.runs) > 1:
                low = [point.mean - (point.half_width or 0) for point in group.curve]
                high = [point.mean + (point.half_width or 0) for point in group.curve]
                axes.fill_between(rounds, low, high, color=colour, alpha=0.2, linewidth=0)
            for past in group.runs:  # rounds that not all runs of the group have
                tail = past.records[len(group.curve) - 1 :]
                values = [scalar(record, comparison.metric) for record in tail]
                axes.plot([record.round for record in tail], values, color=colour, alpha=0.5, linewidth=0.7)
        _dress(axes, "round", comparison.metric)

    caption = (
        f"Mean over the seeds with its {100 * CONFIDENCE:.0f} % interval, as far as all runs of a group go; "
        "thin: single runs that went on."
    )
    return draw("Learning", caption, paint, height=4.0)


def _along(
    comparison: Comparison, groups: Sequence[Group], title: str, caption: str, label: str, along: Along
) -> Plot:
    def paint(axes: Axes) -> None:
        for colour, group in zip(_colours(groups), groups, strict=True):
            for i, past in enumerate(group.runs):
                values = [scalar(record, comparison.metric) for record in past.records]
                name = _name(group) if i == 0 else "_nolegend_"
                axes.plot(along(past), values, color=colour, linewidth=0.9, label=name)
        _dress(axes, label, comparison.metric)

    return draw(title, caption, paint)


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _name(group: Group) -> str:
    # A label that begins with "_" would be left out of the legend, and "$" would be read as mathematics.
    return f" {group.label} (n = {len(group.runs)})".replace("$", r"\$")


def _colours(groups: Sequence[Group]) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    return [to_hex(palette(i)) for i in range(len(groups))]


def _sums(values: Sequence[float]) -> list[float]:
    total, found = 0.0, []
    for value in values:
        total += value
        found.append(total)
    return found
