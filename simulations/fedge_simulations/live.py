"""A run while it goes on: a table that renews itself on a terminal, one line per round anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from fedge.config import Config, Target
from fedge_server.rounds.record import RoundRecord

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_SHOWN: Final = 8  # rounds in the table
_RECENT: Final = 10  # rounds whose time tells how long the others will take
_REFRESH_S: Final = 0.1
_BARS: Final = "▁▂▃▄▅▆▇█"
_SPARKS: Final = 60  # characters at most


class View(Protocol):
    """What hears of a run."""

    def say(self, line: str, /) -> None:
        """Take a line about a stage."""

    def observe(self, record: RoundRecord, /) -> None:
        """Take a committed round."""


def is_watched() -> bool:
    """Whether stdout is a terminal that somebody looks at and that can be redrawn."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


@contextmanager
def watching(config: Config, *, earlier: int = 0) -> Iterator[View]:
    """Show a run on stdout until the end of the block.

    Args:
        config: of the run.
        earlier: rounds that were committed before this call; they are not told again line by line.
    """
    if not is_watched():
        yield Lines(config, earlier)
        return
    from rich.console import Console

    screen = Screen(config, earlier, Console(file=sys.stdout))
    with screen.open():
        yield screen


def rate(records: Sequence[RoundRecord]) -> float:
    """Clients per second of wall time over these rounds."""
    seconds = sum(record.seconds for record in records)
    return sum(record.clients for record in records) / seconds if seconds else 0.0


def simulated(record: RoundRecord) -> str:
    """The simulated clock after a round as text; empty where there is none."""
    return f"{record.simulated_s:,.1f}" if record.simulated_s else ""


def duration(seconds: float) -> str:
    """Seconds as H:MM:SS, or M:SS when under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int = _SPARKS) -> str:
    """Values as bars between their own least and greatest; more than `width` of them are thinned out."""
    step = -(-len(values) // width) if values else 1
    chosen = [values[i] for i in range(len(values) - 1, -1, -step)][::-1]  # the last is always among them
    if not chosen:
        return ""
    low, span = min(chosen), max(chosen) - min(chosen)
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in chosen)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table, for terminals that are wide enough."""

    head: str
    from_width: int  # characters of the terminal
    cell: Callable[[RoundRecord], str]


def _columns(shown: Sequence[RoundRecord]) -> list[_Column]:
    measured = [name for name, value in shown[-1].metrics.items() if isinstance(value, float)]
    metrics = [_Column(name, 0, partial(_scalar, name)) for name in measured if name != "macro_f1"]
    clock = [_Column("simulated s", 90, simulated)] if any(map(simulated, shown)) else []
    return [
        _Column("round", 0, lambda record: str(record.round)),
        *metrics,
        _Column("train loss", 80, lambda r: "" if r.train_loss is None else f"{r.train_loss:.4f}"),
        _Column("clients", 0, lambda record: f"{record.clients:,}"),
        _Column("not used", 70, lambda record: f"{record.failures:,}"),
        _Column("s", 60, lambda record: f"{record.seconds:.2f}"),
        _Column("clients/s", 0, lambda record: f"{rate([record]):,.0f}"),
        *clock,
    ]


def _scalar(name: str, record: RoundRecord) -> str:
    value = record.metrics.get(name)
    return f"{value:.4f}" if isinstance(value, float) else ""


@dataclass(slots=True)
class Lines:
    """One line per round."""

    config: Config
    earlier: int

    def say(self, line: str) -> None:
        """Print it."""
        print(line, flush=True)  # noqa: T201 - this is the command's output

    def observe(self, record: RoundRecord) -> None:
        """Print the round, unless it was committed by an earlier call."""
        from fedge_server.pipeline import round_line

        if record.round > self.earlier:
            clock = f"  simulated {at} s" if (at := simulated(record)) else ""
            self.say(f"{round_line(self.config, record)}{clock}  {rate([record]):,.0f} clients/s")


@dataclass(slots=True)
class Screen:
    """The last rounds, the course of the metric, speed and time left; redrawn by whoever reports."""

    config: Config
    earlier: int
    console: Console
    values: list[float] = field(default_factory=list)  # of the metric, by round
    last: deque[RoundRecord] = field(default_factory=lambda: deque(maxlen=_RECENT))
    drawn_at: float = 0.0
    live: Live | None = None  # while it is open
    over: bool = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the bottom of the terminal for the table until the end of the block."""
        from rich.live import Live

        # A refreshing thread would be in the way of engines that fork.
        with Live(console=self.console, auto_refresh=False, get_renderable=self.render) as live:
            self.live = live
            yield
            self.over = True

    def say(self, line: str) -> None:
        """Print it above the table."""
        self.console.print(line, markup=False, highlight=False)
        self._redraw()

    def observe(self, record: RoundRecord) -> None:
        """Take a round into the table."""
        value = record.metrics.get(self.metric)
        if isinstance(value, (int, float)):
            self.values.append(float(value))
        self.last.append(record)
        if time.monotonic() - self.drawn_at > _REFRESH_S or record.round >= self.config.rounds.count:
            self._redraw()

    @property
    def metric(self) -> str:
        """What the sparkline shows: the target's metric, else the accuracy."""
        target = self.config.rounds.target
        return "accuracy" if target is None else Target.parse(target).metric

    def render(self) -> RenderableType:
        """Table, sparkline and status."""
        from rich.console import Group
        from rich.text import Text

        if not self.last:
            return Text("")
        newest = self.last[-1]
        spark = Text(f"{self.metric}  {sparkline(self.values)}  {self.values[-1]:.4f}" if self.values else "")
        return Group(self._table(), spark, Text(self.status(newest)))

    def status(self, newest: RoundRecord) -> str:
        """How far, how fast, how long still."""
        rounds = self.config.rounds
        own = [record for record in self.last if record.round > self.earlier] or list(self.last)
        clock = f"  simulated {at} s" if (at := simulated(newest)) else ""
        far = f"round {newest.round}/{rounds.count}  {rate(own):,.0f} clients/s{clock}"
        if self.over or newest.round >= rounds.count:
            return far
        left = (rounds.count - newest.round) * sum(record.seconds for record in own) / len(own)
        most = " at most" if rounds.target is not None or rounds.patience is not None else ""
        return f"{far}  {duration(left)} left{most}"

    def _table(self) -> RenderableType:
        from rich.table import Table

        shown = list(self.last)[-_SHOWN:]
        table = Table(box=None, pad_edge=False)
        rows: list[list[str]] = [[] for _ in shown]
        for column in _columns(shown):
            if column.from_width <= self.console.width:
                table.add_column(column.head, justify="right", no_wrap=True)
                for row, record in zip(rows, shown, strict=True):
                    row.append(column.cell(record))
        for row in rows:
            table.add_row(*row)
        return table

    def _redraw(self) -> None:
        self.drawn_at = time.monotonic()
        if self.live is not None:
            self.live.refresh()
