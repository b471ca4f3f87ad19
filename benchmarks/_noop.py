"""A ServerApp for Flower's SuperLink that sends empty rounds when told to, and writes down their times.

`flwr run` starts it in a process of its own; `Baton` is the benchmark's side. Each round waits for the baton,
so that the rounds of the two worlds take turns.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

POLL_S = 0.01
GIVE_UP_S = 600.0  # a benchmark that has gone leaves no process behind

MANIFEST = """\
[project]
name = "noop"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedge"
fab-include = ["pyproject.toml"]

[tool.flwr.app.components]
serverapp = "_noop:app"
clientapp = "fedge_client.app:app"

[tool.flwr.app.config]
baton = ""
"""


@dataclass(frozen=True, slots=True)
class Baton:
    """A folder through which rounds are asked for and answered."""

    folder: Path

    def round_ms(self, number: int, timeout_s: float) -> float:
        """Let round `number` (from 0) run, and return its milliseconds."""
        (self.folder / f"go-{number}").touch()
        done = self.folder / f"done-{number}"
        _until(done.exists, timeout_s)
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["replies"] != found["nodes"]:
            raise RuntimeError(f"round {number}: {found['replies']} of {found['nodes']} answered")
        return float(found["ms"])

    def end(self) -> None:
        """No more rounds."""
        (self.folder / "end").touch()

    def serve(self, one_round: Callable[[], tuple[int, int]]) -> None:
        """Run rounds as they are asked for; each gives the numbers of nodes and of replies."""
        end = self.folder / "end"
        for number in itertools.count():
            go = self.folder / f"go-{number}"
            _until(lambda go=go: go.exists() or end.exists())  # type: ignore[misc]
            if end.exists():
                return
            started = time.perf_counter()
            nodes, replies = one_round()
            ms = (time.perf_counter() - started) * 1e3
            part = self.folder / "part"
            part.write_text(json.dumps({"ms": ms, "nodes": nodes, "replies": replies}), encoding="utf-8")
            part.rename(self.folder / f"done-{number}")


def _until(found: Callable[[], bool], timeout_s: float = GIVE_UP_S) -> None:
    end = time.monotonic() + timeout_s
    while not found():
        if time.monotonic() > end:
            raise TimeoutError(f"the other side did nothing for {timeout_s:g} s")
        time.sleep(POLL_S)


def ping(grid: Grid, nodes: Sequence[int], timeout_s: float = 120.0) -> int:
    """One empty round: a message to each node and its answer; how many answered without an error."""
    from flwr.app import Message, RecordDict

    asked = [Message(RecordDict(), node, "query.ping") for node in nodes]
    return sum(not reply.has_error() for reply in grid.send_and_receive(asked, timeout=timeout_s))


def _app() -> object:
    from flwr.serverapp import ServerApp

    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())
        Baton(Path(str(context.run_config["baton"]))).serve(lambda: (len(nodes), ping(grid, nodes)))

    return made


app = _app()
