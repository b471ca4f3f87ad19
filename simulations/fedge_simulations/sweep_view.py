"""A sweep while it goes on: bars on a terminal, one line per ended run anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedge_simulations.live import is_watched
from fedge_simulations.sweep import Planned
from fedge_simulations.sweeping import Heard, Manner, Outcome

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@contextmanager
def watching(planned: Sequence[Planned], manner: Manner) -> Iterator[Heard]:
    """Show a sweep on stdout until the end of the block."""
    count = len(planned)
    print(f"{count} runs, {min(manner.parallel, count)} at once", flush=True)  # noqa: T201 - the output
    if not is_watched():
        yield Heard(ended=_Lines(count).ended)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(file=sys.stdout),
    )  # fmt: skip
    with shown:
        bars = _Bars(shown, shown.add_task("runs", total=count), _Lines(count))
        yield Heard(bars.began, bars.round, bars.ended)


class _Lines:
    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0

    def ended(self, outcome: Outcome) -> None:
        print(self.line(outcome), flush=True)  # noqa: T201 - this is the command's output

    def line(self, outcome: Outcome) -> str:
        self._done += 1
        how = {"done": "done", "skipped": "was finished before", "failed": "FAILED"}[outcome.ended]
        why = f": {outcome.reason}" if outcome.reason else ""
        return f"[{self._done:>{len(str(self._count))}}/{self._count}] {outcome.run.name}  {how}{why}"


class _Bars:
    """One bar for all runs, and one for each that is under way."""

    def __init__(self, progress: Progress, whole: TaskID, lines: _Lines) -> None:
        self._progress, self._whole, self._lines = progress, whole, lines
        self._bars: dict[str, TaskID] = {}

    def began(self, run: Planned) -> None:
        self._bars[run.name] = self._progress.add_task(run.name, total=run.config.rounds.count)

    def round(self, run: Planned, heard: Mapping[str, Any]) -> None:
        self._progress.update(self._bars[run.name], completed=heard["round"])

    def ended(self, outcome: Outcome) -> None:
        if (bar := self._bars.pop(outcome.run.name, None)) is not None:
            self._progress.remove_task(bar)
        self._progress.console.print(self._lines.line(outcome), markup=False, highlight=False)
        self._progress.advance(self._whole)
