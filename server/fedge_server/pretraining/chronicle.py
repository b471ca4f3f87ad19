"""What the first process writes down: rounds in the registry and in `history.jsonl`, in the end the model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedge.config import Config
from fedge.dataset import Array
from fedge.files import write_atomically
from fedge.learning.state import NamedArrays
from fedge.task import Task
from fedge_server.data import ServerData
from fedge_server.pretraining.preparing import HISTORY, SUMMARY
from fedge_server.registry.database import Registry
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.scoring import score, sureness
from fedge_server.rounds.starting import MODEL_FILE, about
from fedge_server.rounds.stopping import reached_target_at, why_stop


@dataclass(slots=True)
class Chronicle:
    """The rounds of a run, as they are committed."""

    registry: Registry
    folder: Path
    run_id: str
    config: Config
    task: Task
    data: ServerData
    records: list[RoundRecord] = field(init=False)

    def __post_init__(self) -> None:
        """Read what has been committed, and write its history anew: a kill may have cut the last line."""
        self.records = self.registry.records(self.run_id)
        lines = [json.dumps(record.to_json()) + "\n" for record in self.records[1:]]
        write_atomically(self.folder / HISTORY, "".join(lines).encode())

    @property
    def why_stop(self) -> str | None:
        """Why no further round should run, or None."""
        return why_stop(self.records, self.config.rounds)

    def commit(
        self, number: int, loss: float, seconds: float, answers: Array, kept: NamedArrays, state: bytes
    ) -> RoundRecord:
        """Measure a round and make it count.

        Args:
            number: of the round.
            loss: mean training loss.
            seconds: that it took.
            answers: probabilities (N, K) for the test data.
            kept: the model's state and its moments.
            state: what the next round needs besides.
        """
        found = np.ascontiguousarray(answers, dtype=np.float32)
        sure = sureness(found, self.data, self.config)
        done = RoundRecord(
            number,
            score(found, self.data, self.config),
            clients=1,  # the server itself, whose data stand where else the set of updates does
            asked=1,
            updates=self.data.digest(),
            train_loss=loss,
            seconds=seconds,
            intervals=sure.intervals,
            target_bound=sure.target_bound,
        )
        says = about(self.config, self.task, self.data.spec)
        self.registry.commit_round(self.run_id, done, kept, state, says)
        self.records.append(done)
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(done.to_json()) + "\n")
        return done

    def line(self, done: RoundRecord) -> str:
        """A round in one line."""
        count = self.config.rounds.count
        seen = len(self.data.proxy) * self.config.train.epochs
        return (
            f"round {done.round:>{len(str(count))}}/{count}  loss {done.metrics['loss']:.4f}  "
            f"accuracy {done.metrics['accuracy']:.4f}  training loss {done.train_loss:.4f}  "
            f"{done.seconds:.2f} s  {seen / max(done.seconds, 1e-9):,.0f} examples/s"
        )

    def conclude(self, sizes: dict[str, int], further: dict[str, Any]) -> None:
        """Write the model and, last of all, the summary, which says that the run is whole.

        Args:
            sizes: of the global model: parameters and bytes.
            further: who did it, and how long it took.
        """
        last, committed = self.records[-1], self.registry.last_round(self.run_id)
        digest = "" if committed is None else committed.model_sha256
        shutil.copyfile(self.registry.store.path(digest), self.folder / MODEL_FILE)
        scalars = {key: value for key, value in last.metrics.items() if isinstance(value, float)}
        summary: dict[str, Any] = {
            "task": self.config.task,
            "seed": self.config.seed,
            "rounds": last.round,
            "stopped": self.why_stop,
            "origin": dict(self.records[0].origin),
            "reached_target_at": reached_target_at(self.records, self.config.rounds),
            "examples": len(self.data.proxy),
            "global_model": {**scalars, **sizes, "sha256": digest},
            **further,
        }
        self.registry.end_run(self.run_id, "done", self.why_stop or "")
        kept = {key: value for key, value in summary.items() if value not in (None, {})}
        write_atomically(self.folder / SUMMARY, json.dumps(kept, indent=2).encode())
