"""Where the clients are the data: they teach the students, calibrate the graphs and count for the gate.

Nothing of the server's own is needed for it. What comes back is a student's update in rounds like any other
(`rounds.teaching`), two numbers for each activation, or counts by class (`fedge.learning.surveys`). It is
bounded and looked at; a client whose answer is none is left out with its reason.

Which clients lie nobody knows. So of the clients' extremes the outermost are not believed (`merged`), and
nobody counts for more than `compress.clients.max_examples` examples.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedge.config import Compress, Config, Distil
from fedge.counts import Counts
from fedge.errors import CompressionError, FormatError, RoundError, TimeUpError
from fedge.holdout import Part
from fedge.learning.messages import METRICS, Instructions
from fedge.learning.state import arrays_of, digest
from fedge.learning.surveys import (
    COUNTS,
    GRAPH,
    MAX_CALIBRATED,
    QUERY_COUNTS,
    QUERY_RANGES,
    RANGES,
    UNUSABLE,
    VARIANT,
    Survey,
    asking,
    counts_like,
    ranges_like,
)
from fedge.learning.terms import Lesson, Terms
from fedge.learning.whole import WholeModel
from fedge.ranges import Ranges
from fedge.routing import Routing
from fedge.statistics import Moments
from fedge.task import STUDENT, Task
from fedge.task_digest import task_digest
from fedge.wire.arrays import in_memory, records_of
from fedge_server.compression.gate import Evidence
from fedge_server.compression.layer_inputs import Inputs
from fedge_server.compression.onnx_graph import load
from fedge_server.compression.quantise import quantise_within, watched
from fedge_server.compression.recovery import Cut
from fedge_server.data import ServerData
from fedge_server.registry.database import Registry
from fedge_server.rounds.grids import Simulated, nodes_of
from fedge_server.rounds.loop import learn
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.sampling import MANY, draw
from fedge_server.rounds.teaching import Teacher, Teaching, config_of
from fedge_server.rounds.validation import declared_fault, error_of
from fedge_server.strategies.robust import RULES

T = TypeVar("T")
Over = Callable[[Path], AbstractContextManager[Grid]]
"""Opens a Grid over the run's clients; what it has to keep goes into that folder."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """How the clients of a run can be asked once its rounds are over."""

    over: Over
    folder: Path  # where students' rounds are kept, so that they can be resumed


@dataclass(slots=True)
class Clients:
    """The clients of a run as the source of all that compression needs to know of data."""

    config: Config
    task: Task
    data: ServerData  # its test data show how a student's rounds go, and decide nothing
    fleet: Fleet
    model: WholeModel  # the global one
    moments: Moments | None  # by which its inputs are standardised
    say: Callable[[str], None] = lambda _: None
    kind: str = field(default="clients", init=False)
    learns: bool = field(default=True, init=False)
    trains_grids: bool = field(default=False, init=False)  # clients build what they train, and not these
    gate_examples: int | None = field(default=None, init=False)  # only the clients know
    _teacher: Teacher | None = field(default=None, init=False)

    def make_ready(self) -> None:
        """Nothing: each student's rounds send the teacher to whom has it not."""

    def identity(self) -> bytes:
        """The clients' data are not known; the global model says which run it is."""
        return self.kind.encode()

    def pruned(
        self, network: nn.Module, cut: Cut, settings: Compress, *, seed: int, deadline: float | None = None
    ) -> nn.Module:
        """Refused: clients build what they train themselves, and this network is none of the task's."""
        raise CompressionError("clients: a pruned network cannot be trained by them; name students instead")

    def selection_of(self, network: nn.Module) -> Counts | None:
        """Not asked: a round trip to every client for a network that is no candidate yet."""
        return None

    def describe(self) -> str:
        """In a line."""
        return "students, ranges and counts come from the clients' own data"

    def teach(
        self,
        student: nn.Module,
        settings: Distil,
        *,
        model: str,
        seed: int,
        deadline: float | None = None,
    ) -> nn.Module:
        """The student, as the clients' rounds have trained it; the argument is not changed.

        Args:
            student: its weights are the starting point.
            settings: of the lesson; passes and learning rate are those of `compress.clients`, and there are
                as many fewer rounds as these epochs are fewer than those of `compress.distil`.
            model: by which clients know its architecture, such as 'student:small'; empty: they do not.
            seed: must be the run's: it also divides the clients' examples into those that train and judge.
            deadline: a value of `time.monotonic` after which no further round begins; None: none.

        Raises:
            CompressionError: clients cannot build or train it, or too few of them answered.
            TimeUpError: the deadline has passed; rounds that were made are kept.
        """
        if not model:
            raise CompressionError(
                "clients: a network that is none of the task's cannot be trained by them, who build what "
                "they train themselves; name a student (a task's `students`)"
            )
        if settings.hint_weight:
            raise CompressionError("clients: compress.distil.hint_weight is for proxy data; set it to 0")
        if seed != self.config.seed:
            raise CompressionError(
                f"clients: seed {seed} would divide their examples anew; it must be the run's"
            )
        robust = self.config.strategy.name in {rule.__name__.lower() for rule in RULES}
        own = config_of(self.config, model, settings, robust=robust)
        share = settings.epochs / self.config.compress.distil.epochs
        own = replace(own, rounds=replace(own.rounds, count=max(round(own.rounds.count * share), 1)))
        run_id = _name(model, student, own)
        home = self.fleet.folder / run_id
        with self._asking(home) as (grid, teacher), Registry.open(home) as registry:
            teaching, heard = Teaching(student, teacher, settings), self._observe(model, own, deadline)
            try:
                learned = learn(grid, own, self.task, self.data, registry, run_id, heard, teaching)
            except RoundError as error:
                raise CompressionError(f"clients: {model}: {error}") from error
            registry.end_run(run_id, "done", learned.reason)
        return learned.model.network.eval()

    def calibrate(self, graph: bytes) -> bytes:
        """The graph in int8, by the ranges that clients have seen.

        Raises:
            CompressionError: it cannot be quantised, or nobody has told any.
        """
        seen = watched(graph)
        tensors = ranges_like(len(load(seen).graph.output))
        clients = self.config.compress.clients
        survey = Survey(clients.min_examples, max(clients.min_examples, MAX_CALIBRATED))
        parts = self._ask(QUERY_RANGES, GRAPH, seen, survey, lambda reply: _ranges(reply, tensors))
        return quantise_within(graph, merged(parts, clients.trim))

    def inputs_of(self, graph: bytes) -> tuple[Inputs | None, ...]:
        """Not asked: a second moment says more of one client's data than ranges and counts do."""
        return ()

    def probabilities(self, graph: bytes) -> None:
        """Not asked: answers are of single examples."""
        return

    def selection(self, wire: bytes, installed_bytes: int) -> Counts:
        """What teacher and variant get right of the clients' examples for selection.

        Raises:
            CompressionError: nobody has counted.
        """
        return self._counted(wire, installed_bytes, "selection").counts

    def evidence(self, wire: bytes, installed_bytes: int) -> Evidence:
        """What teacher and variant get right of the clients' examples for the gate, all of them together.

        Raises:
            CompressionError: nobody has counted.
        """
        return self._counted(wire, installed_bytes, "gate")

    def routing(self, wire: bytes, installed_bytes: int, among: int) -> Routing:
        """Not known: clients count for all their examples together, and tell nothing of one answer."""
        doubt = self.config.compress.routing.doubt
        return Routing(doubt, reason="clients tell how many answers are right, and not how doubtful each is")

    def _counted(self, wire: bytes, installed_bytes: int, part: Part) -> Evidence:
        clients, classes = self.config.compress.clients, self.data.spec.classes
        least = clients.min_examples
        most = max(clients.max_examples, least)
        survey = Survey(least, most, part, clients.selection_share, installed_bytes)
        like = counts_like(classes)
        told = self._ask(QUERY_COUNTS, VARIANT, wire, survey, lambda reply: _counts(reply, like, survey))
        bad = sum(unusable > 0 for _, unusable in told)
        faults: tuple[str, ...] = ()
        if bad >= min(2, len(told)):  # one alone may say anything
            faults = (f"the variant gives NaN or infinite probabilities on {bad} of {len(told)} clients",)
        return Evidence(Counts.sum((counts for counts, _ in told), classes), faults, len(told))

    def _ask(
        self, kind: str, name: str, data: bytes, survey: Survey, read: Callable[[Message], T]
    ) -> list[T]:
        """What each client that answers says, in the clients' order.

        One that had kept the teacher and lost it is asked again, with the teacher.
        """
        found: dict[int, T] = {}
        faults: list[str] = []
        with self._asking(self.fleet.folder / kind) as (grid, teacher):
            lesson = teacher.lesson() if kind == QUERY_COUNTS else None
            content = asking(self._instructions(lesson), survey, name, data)
            seed = self.config.seed
            wanted = sorted(draw(grid, nodes_of(grid), MANY, seed=seed, number=0, purpose=kind))
            knowing = set(wanted) & teacher.holders
            for nodes in (wanted, sorted(knowing)):
                again = [node for node in nodes if node not in found]
                if not again or (nodes is not wanted and lesson is None):
                    break
                for reply in self._replies(grid, kind, again, content, teacher if lesson else None):
                    _take(reply, set(again), found, faults, read)
        if len(found) < max(self.config.rounds.min_updates, 1):
            reason = faults[0] if faults else "nobody answered"
            raise CompressionError(f"clients: {len(found)} of {len(wanted)} answered {kind} ({reason})")
        if faults:
            self.say(f"compress: {kind}: {len(faults)} clients are left out, the first since {faults[0]}")
        return [found[node] for node in sorted(found)]

    def _replies(
        self, grid: Grid, kind: str, nodes: Sequence[int], content: RecordDict, teacher: Teacher | None
    ) -> Iterable[Message]:
        sent = [Message(content, node, kind) for node in nodes]
        sent = sent if teacher is None else teacher.sent_with(sent)
        replies = grid.send_and_receive(sent, timeout=self.config.rounds.deadline_s)
        return replies if teacher is None else teacher.noted(replies)

    @contextmanager
    def _asking(self, folder: Path) -> Iterator[tuple[Grid, Teacher]]:
        """The Grid for as long as something is asked; and the teacher, the same for all that is ever asked.

        Simulated clients share the server's memory and need not keep it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with self.fleet.over(folder) as grid:
            if self._teacher is None:
                name = self.config.model.name or self.task.default_model
                keep = not isinstance(grid, Simulated)
                self._teacher = Teacher.of(name, self.model.network, self.moments, keep=keep)
            yield grid, self._teacher

    def _instructions(self, lesson: Lesson | None) -> Instructions:
        config = self.config
        return Instructions(
            task=config.task,
            spec=self.data.spec,
            model=config.model.name or self.task.default_model,
            noise_filter=config.model.filter,
            moments=self.moments,
            train=config.train,
            seed=config.seed,
            update="weights",
            task_digest=task_digest(config.task),
            holdout=config.evaluate.client_holdout,
            terms=Terms(lesson=lesson),
        )

    def _observe(self, model: str, config: Config, deadline: float | None) -> Callable[[RoundRecord], None]:
        name, count = model.removeprefix(STUDENT), config.rounds.count

        def observe(record: RoundRecord) -> None:
            if deadline is not None and time.monotonic() > deadline and record.round < count:
                raise TimeUpError(f"clients: the time is up after round {record.round} of {count}")
            self.say(
                f"compress: student {name}, round {record.round}/{count}: {record.clients} clients, "
                f"accuracy {record.metrics.get('accuracy', float('nan')):.4f}"
            )

        return observe


def merged(parts: Sequence[Ranges], trim: float) -> Ranges:
    """One range of each tensor, from those of clients: the outermost at either end are not believed.

    The k-th largest of the highest values, and the k-th smallest of the lowest: whatever up to k - 1 clients
    say, the range is no wider than some honest client's, and no narrower than it would be with k - 1 honest
    clients less (a trimmed extreme; Huber 1981, Robust Statistics, on breakdown points).

    Args:
        parts: one of each client, at least one.
        trim: share of the clients that is left out at either end, one of three or more at least; of fewer
            than three nobody is. 0: nobody.
    """
    cut = left_out(len(parts), trim)
    lowest = np.sort(np.stack([part.lowest for part in parts]), axis=0)
    highest = np.sort(np.stack([part.highest for part in parts]), axis=0)
    return Ranges(lowest[cut], highest[len(parts) - 1 - cut])


def left_out(clients: int, trim: float) -> int:
    """How many clients' extremes are not believed."""
    return max(1, int(trim * clients)) if clients >= 3 and trim > 0 else 0


def _take(
    reply: Message,
    asked: set[int],
    found: dict[int, T],
    faults: list[str],
    read: Callable[[Message], T],
) -> None:
    """Read the first answer of each client that was asked; what is none is a fault."""
    node = reply.metadata.src_node_id
    if node not in asked or node in found:
        return
    try:
        if reply.has_error():
            raise FormatError(error_of(reply))
        found[node] = read(reply)
    except FormatError as error:
        faults.append(str(error))
    except Exception as error:  # noqa: BLE001 - it leaves the client out, not the others
        faults.append(f"cannot be read ({type(error).__name__}: {error})"[:300])


def _arrays(
    reply: Message, name: str, like: Mapping[str, npt.NDArray[np.generic]]
) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays of a reply, none of which is decoded before what it says of itself is as it should be."""
    record = records_of(reply.content, ArrayRecord).get(name)
    if record is None or list(record) != list(like):
        raise FormatError(f"{name}: arrays {sorted(record or ())} instead of {list(like)}")
    found = {}
    for key, expected in like.items():
        if (fault := declared_fault(record[key], expected)) is not None:
            raise FormatError(f"{name}: array {key!r} {fault}")
        found[key] = in_memory(record[key]).numpy()
        if found[key].shape != expected.shape or found[key].dtype != expected.dtype:
            raise FormatError(f"{name}: array {key!r} decodes to {found[key].dtype} {found[key].shape}")
    return found


def _ranges(reply: Message, like: Mapping[str, npt.NDArray[np.generic]]) -> Ranges:
    if sorted(reply.content) != [RANGES]:
        raise FormatError(f"records {sorted(reply.content)} instead of {[RANGES]}")
    arrays = _arrays(reply, RANGES, like)
    try:
        return Ranges(arrays["lowest"].astype(np.float32), arrays["highest"].astype(np.float32))
    except ValueError as error:
        raise FormatError(f"{RANGES}: {error}") from error


def _counts(
    reply: Message, like: Mapping[str, npt.NDArray[np.generic]], survey: Survey
) -> tuple[Counts, int]:
    if sorted(reply.content) != sorted((COUNTS, METRICS)):
        raise FormatError(f"records {sorted(reply.content)} instead of {sorted((COUNTS, METRICS))}")
    arrays = {name: value.astype(np.int64) for name, value in _arrays(reply, COUNTS, like).items()}
    metrics = records_of(reply.content, MetricRecord)[METRICS]
    unusable = metrics.get(UNUSABLE)
    try:
        counts = Counts(**arrays)
    except ValueError as error:
        raise FormatError(f"{COUNTS}: {error}") from error
    if (counts.n > survey.most).any() or not survey.least <= counts.examples <= survey.most:
        raise FormatError(f"{COUNTS}: {survey.least} to {survey.most} examples were asked for")
    if set(metrics) != {UNUSABLE} or type(unusable) is not int or not 0 <= unusable <= counts.examples:
        raise FormatError(f"{METRICS}: {UNUSABLE} is {unusable!r}; it must be so many of the examples")
    return counts, unusable


def _name(model: str, student: nn.Module, config: Config) -> str:
    """Of a student's rounds: another start or other settings are other rounds."""
    said = json.dumps([digest(arrays_of(student)), config.to_mapping()], sort_keys=True)
    plain = "".join(letter if letter.isalnum() else "-" for letter in model)
    return f"{plain[:40]}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"
