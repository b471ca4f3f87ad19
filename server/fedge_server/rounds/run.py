"""One run between two rounds: what it remembers, and how a round of it goes."""

from __future__ import annotations

import random
import time
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from fedge.codecs.layout import Layout
from fedge.config import Config
from fedge.errors import FedgeError, RoundError
from fedge.learning import local, messages
from fedge.learning.guard import reference
from fedge.learning.messages import Instructions
from fedge.learning.state import NamedArrays, cast_like, share_arrays
from fedge.learning.terms import Beside
from fedge.learning.whole import WholeModel
from fedge_server import strategies
from fedge_server.data import ServerData
from fedge_server.evaluation.clients import on_clients
from fedge_server.privacy.protection import Protection
from fedge_server.registry.database import Registry
from fedge_server.rounds.anomalies import scored
from fedge_server.rounds.asynchronous import UnderWay
from fedge_server.rounds.choosing import Choice
from fedge_server.rounds.closing import (
    Collected,
    TooFewError,
    collect,
    enough,
    if_enough,
    in_order,
    payload_bytes,
    payload_bytes_of,
    singles,
    sums,
)
from fedge_server.rounds.decoding import Decoder
from fedge_server.rounds.downlink import Downlink
from fedge_server.rounds.frozen import Frozen
from fedge_server.rounds.grids import Identified, Simulated, Summing, nodes_of
from fedge_server.rounds.moments import moments_arrays
from fedge_server.rounds.norms import norm_limit
from fedge_server.rounds.pace import Pace
from fedge_server.rounds.rates import learning_rate
from fedge_server.rounds.record import Metric, RoundRecord
from fedge_server.rounds.sampling import MANY, Cohort, cohort_size, draw, draw_each
from fedge_server.rounds.scoring import Answers, Sureness, is_finite, probabilities_of, score, sureness
from fedge_server.rounds.secure import secure_sum
from fedge_server.rounds.stopping import check_hope
from fedge_server.rounds.teaching import Teaching
from fedge_server.rounds.traffic import Traffic
from fedge_server.rounds.validation import Rules
from fedge_server.rounds.work import Look, most_passes, passes
from fedge_server.strategies.asynchronous import Asynchronous
from fedge_server.strategies.state import Remembered, capture


@dataclass(slots=True)
class Run:
    """The moving parts of a run between two rounds."""

    grid: Grid
    config: Config
    data: ServerData
    registry: Registry
    run_id: str
    instructions: Instructions
    model: WholeModel  # scratch: weights are loaded before each use
    chosen: strategies.Chosen
    protection: Protection | None
    arrays: NamedArrays  # the global state
    model_sha256: str
    records: list[RoundRecord]
    about: Mapping[str, str]  # metadata of the model's file
    coded: set[int] = field(default_factory=set)  # clients whose update came in the codec in this round
    downlink: Downlink | None = None  # of runs that send changes of the global state
    answers: Answers | None = None  # of the global state to the test data, once it was asked
    under_way: UnderWay | None = None  # of asynchronous rounds
    pace: Pace | None = None  # of runs that fit clients' work to their speed
    choice: Choice | None = None  # of runs that choose clients by what is known of them
    frozen: Frozen | None = None  # of runs that leave parts of the model as they are
    look: Look | None = None  # at this round's answers, in runs that decide by them how much is worked
    teaching: Teaching | None = None  # of rounds in which clients learn from a model's answers

    def next_round(self) -> RoundRecord:
        """One whole round: choose, configure, send, collect, aggregate, evaluate, commit."""
        started, number = time.perf_counter(), self.records[-1].round + 1
        self.coded = set()
        meter = Traffic.of(self.grid)
        if self.protection is not None:
            self.protection.afford(number)
        if isinstance(self.grid, Simulated):
            self.grid.begin_round(number)
        updates, collected = self.ask(number)
        metrics, counted = self.aggregate(number, updates, collected)
        if self.downlink is not None:
            made = self.downlink if counted else self.downlink.stayed(self.shared)
            self.downlink = made.held_by(self.coded)
        scores, sure = self.evaluate_centrally()
        measured = self.evaluate_on_clients(number) if self.config.evaluate.federated else {}
        now = Traffic.of(self.grid)
        travelled = now.since(meter) if now and meter else None
        record = RoundRecord(
            round=number,
            metrics=scores,
            clients=collected.clients if counted else 0,
            asked=collected.asked,
            rejected=tuple(collected.rejected),
            train_loss=None if self.protection else _scalar(metrics, messages.TRAIN_LOSS),
            seconds=time.perf_counter() - started,
            bytes_up=collected.bytes_up if travelled is None else travelled.bytes_up,
            bytes_down=collected.bytes_down if travelled is None else travelled.bytes_down,
            late=0 if travelled is None else travelled.late,
            updates=collected.updates if counted else "",
            staleness=sum(collected.ages) / len(collected.ages) if collected.ages else None,
            norm=collected.norm if counted else None,
            counted=counted,
            client_metrics=measured,
            simulated_s=self.simulated_s(),
            intervals=sure.intervals,
            target_bound=sure.target_bound,
            anomalies=collected.scores,
            **({} if self.look is None else self.look.found(self.passes)),
            privacy={**collected.facts, **({} if self.protection is None else self.protection.of_round())},
        )
        self.commit(record)
        check_hope(self.records)
        return record

    def ask(self, number: int) -> tuple[Iterable[Message], Collected]:
        """The updates of the round's clients, each as it comes; and what is known of them then.

        As partial sums where strategy and Grid can do with those, else as an answer from each.
        """
        if self.under_way is not None:
            return self.ask_on(number, self.under_way)
        nodes, rounds = self.draw(number, MessageType.TRAIN), self.config.rounds
        collected = Collected(asked=len(nodes))
        if not nodes:  # Poisson sampling may ask nobody
            return (), collected
        if self.protection is not None:
            self.protection.before_asking(number)
        if self.config.privacy.secure_aggregation:
            return secure_sum(
                self.grid,
                self.config,
                self.run_id,
                number,
                list(self.configure(number, MessageType.TRAIN, nodes)),
                self.origin(),
                protection=self.protection,
                simulated=isinstance(self.grid, Simulated),
                signed=isinstance(self.grid, Identified) and self.grid.identified,
            )
        needed = enough(len(nodes), rounds.quorum, rounds.min_updates)
        if self.summed and isinstance(self.grid, Summing) and self.grid.can_sum:
            (asked,) = self.configure(number, MessageType.TRAIN, nodes[:1])
            came = self.grid.sum_updates(asked, nodes, timeout=rounds.deadline_s, enough=needed)
            collected.bytes_down = len(nodes) * payload_bytes(asked)
            admit = sums(self.rules(number), set(nodes))
        else:
            sent = list(self.configure(number, MessageType.TRAIN, nodes))
            if self.downlink is not None:
                sent = self.downlink.dressed(sent, sum(value.nbytes for value in self.shared.values()))
            sent = sent if self.pace is None else self.pace.fitted(sent)
            self.look = Look(self.origin(), self.now) if self.adaptive else None
            came = self.grid.send_and_receive(sent, timeout=rounds.deadline_s)
            came = came if self.teaching is None else self.teaching.teacher.noted(came)
            came = came if self.pace is None else self.pace.watched(came, nodes, self.now)
            admit, collected.bytes_down = singles(self.rules(number), set(nodes)), payload_bytes_of(sent)
            for part in (self.look, self.choice, self.frozen):
                admit = admit if part is None else part.around(admit)
        return collect(came, admit, collected, needed=needed, once=self.at_once), collected

    def ask_on(self, number: int, under_way: UnderWay) -> tuple[Iterable[Message], Collected]:
        """The same in an asynchronous round, which nobody is drawn for: clients go on working."""
        strategy, collected = self.chosen.strategy, Collected()
        assert isinstance(strategy, Asynchronous)  # noqa: S101 - only then is anything under way

        def make(nodes: Sequence[int]) -> Sequence[Message]:
            return list(self.configure(number, MessageType.TRAIN, nodes))

        came = under_way.replies(number, self.shared, make, collected)
        came = came if self.teaching is None else self.teaching.teacher.noted(came)
        admit = under_way.admit(self.rules(number), number)
        admit = admit if self.frozen is None else self.frozen.around(admit)
        updates = collect(came, admit, collected, needed=strategy.buffer, once=self.at_once)
        return under_way.moved(updates, number, strategy, collected), collected

    @property
    def summed(self) -> bool:
        """Whether one reply may stand for many clients: nothing is done with each of them by itself."""
        alone = self.protection is not None or self.config.validate.of_singles or self.pace is not None
        alone = alone or self.adaptive or (self.choice is not None and self.choice.by == "size")
        alone = alone or (self.frozen is not None and self.frozen.keep)
        return self.chosen.sums and not (alone or self.instructions.codec is not None or self.scoring)

    @property
    def adaptive(self) -> bool:
        """Whether clients' work is decided by what earlier rounds have shown."""
        return self.config.rounds.local_work == "adaptive"

    @property
    def passes(self) -> int:
        """That each client makes over its data in the next round."""
        return passes(self.records, self.config)

    @property
    def at_once(self) -> bool:
        """Whether each update is used up as it comes."""
        central = self.protection is not None and self.protection.central
        return central or (self.chosen.single_pass and not self.scoring)

    def rules(self, number: int) -> Rules:
        """What the round's updates must be."""
        validate = self.config.validate
        central = self.protection is not None and self.protection.central
        return Rules(
            self.origin(),
            guarded=self.instructions.guard is not None,
            max_examples=validate.max_examples,
            max_norm=norm_limit(validate, self.records),
            norms=validate.norms and not central,  # the record would show what no noise covers
            read_once=self.at_once,
            beside=self.beside(),
            decode=self.decoder(number),
        )

    @property
    def scoring(self) -> bool:
        """Whether each update is held against the others."""
        wanted = self.config.evaluate.anomalies
        alike = self.chosen.like is None
        return not self.chosen.single_pass and alike if wanted is None else wanted

    def origin(self) -> Mapping[str, npt.NDArray[np.generic]]:
        """What clients' changes are measured from."""
        return reference(self.shared, local.gradients_of(self.model.network, self.chosen.update))

    @property
    def shared(self) -> NamedArrays:
        """The part of the global state that clients send; the rest stays as it was at first."""
        return self.chosen.terms.shared(self.arrays)

    def beside(self) -> Beside:
        """What each reply must hold besides."""
        shared, network = self.shared, self.model.network
        parameters = {name: shared[name] for name, _ in network.named_parameters() if name in shared}
        most = most_passes(self.config) * messages.MAX_EXAMPLES
        return Beside.of(self.chosen.terms, parameters, most, self.chosen.like)

    def decoder(self, number: int) -> Decoder | None:
        """What turns this round's updates back into arrays, where clients are asked to use a codec."""
        if (codec := self.instructions.codec) is None:
            return None
        layout = Layout.of(self.origin(), local.parameters_of(self.model.network))
        return Decoder(codec, layout, self.config.seed, number, self.coded)

    def draw(self, number: int, kind: str) -> list[int]:
        """The clients that this round asks: its cohort to train, all or MANY of them to evaluate."""
        nodes = nodes_of(self.grid)
        if kind == MessageType.TRAIN and self.config.rounds.sampling == "poisson":
            share = self.config.rounds.fraction
            return draw_each(self.grid, nodes, share, seed=self.config.seed, number=number)
        wanted = cohort_size(len(nodes), self.config.rounds) if kind == MessageType.TRAIN else MANY
        if kind == MessageType.TRAIN and self.protection is not None and self.protection.central:
            wanted = min(self.protection.expected, len(nodes))
        if kind == MessageType.TRAIN and self.choice is not None:
            return self.choice.draw(self.grid, nodes, wanted, seed=self.config.seed, number=number)
        return draw(self.grid, nodes, wanted, seed=self.config.seed, number=number, purpose=kind)

    def configure(self, number: int, kind: str, nodes: Sequence[int]) -> Iterable[Message]:
        """The round's messages, as the strategy makes them from the same seed however often it is asked."""
        _reseed(self.config.seed, number, kind)
        strategy = self.chosen.strategy
        make = strategy.configure_train if kind == MessageType.TRAIN else strategy.configure_evaluate
        rate = learning_rate(number, self.config)
        train = replace(self.instructions.train, epochs=self.passes, learning_rate=rate)
        checksum = None if self.frozen is None else self.frozen.checksum
        record = replace(self.instructions, train=train, frozen_sum=checksum).to_config()
        sent = list(make(number, messages.to_record(self.shared), record, Cohort(self.grid, nodes)))
        sent = sent if self.frozen is None else self.frozen.dressed(sent)
        if self.teaching is None or self.chosen.terms.lesson is None or kind != MessageType.TRAIN:
            return sent
        return self.teaching.teacher.sent_with(sent)

    def aggregate(
        self, number: int, updates: Iterable[Message], collected: Collected
    ) -> tuple[MetricRecord | None, bool]:
        """Let the strategy turn the updates into the next global state; False: it declined, or spoilt it.

        State and strategy stay as they were unless the new state is finite and answers in finite numbers: one
        client's absurd but well-formed update must not end the run, nor live on in the strategy's moments.
        """
        before, answered, downlink = self.arrays, self.answers, self.downlink
        remembered = Remembered(self.chosen.strategy)
        try:
            found, metrics = self.combine(number, updates, collected)
            if found is None:
                return None, False
            pieces, found = dict(found), None  # where the strategy keeps none of them, each goes once read
            shared = cast_like(messages.from_record(pieces, consume=True), self.shared)
            self.arrays = {name: shared.get(name, value) for name, value in before.items()}
        except TooFewError:
            return None, False
        except FedgeError:
            raise
        except Exception as error:  # a strategy may be anyone's code
            if error is collected.broke:
                raise
            raise RoundError(
                f"round {number}: strategy {self.config.strategy.name!r} could not aggregate "
                f"{collected.clients} updates ({type(error).__name__}: {error})"
            ) from error
        if not self.is_sound(before):
            self.arrays, self.answers, self.downlink = before, answered, downlink
            remembered.put_back()
            return None, False
        return metrics, True

    def combine(
        self, number: int, updates: Iterable[Message], collected: Collected
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the updates: of each as it comes, or of a list in the order of clients.

        Raises:
            TooFewError: the updates are not enough; what the strategy remembers is as it was.
        """
        updates = if_enough(updates, collected, self.config.rounds.min_updates)
        if self.protection is not None and self.protection.central:
            updates = [self.protection.noised(number, updates, collected, self.origin())]
        elif not self.at_once:
            updates = in_order(updates)
            collected.scores = scored(updates, self.origin()) if self.scoring else ()
        _reseed(self.config.seed, number, "aggregate")
        return self.chosen.strategy.aggregate_train(number, updates)

    def is_sound(self, before: NamedArrays) -> bool:
        """Whether the global state, as clients will have it, and its answers to the test data are finite."""
        if not all(is_finite(value) for value in self.arrays.values() if value.dtype.kind == "f"):
            return False
        if self.downlink is not None:
            old = self.chosen.terms.shared(before)
            self.downlink, self.arrays = self.downlink.settled(old, self.arrays)
        return bool(np.isfinite(self.ask_global()).all())

    def ask_global(self) -> Answers:
        """What the global state answers to the test data, for whoever asks next too."""
        self.load_global()
        self.answers = probabilities_of(self.model, self.data.test)
        return self.answers

    def evaluate_centrally(self) -> tuple[dict[str, Metric], Sureness]:
        """Metrics of the global model on the server's test data, and how sure the one is that decides."""
        answers = self.ask_global() if self.answers is None else self.answers
        return score(answers, self.data, self.config), sureness(answers, self.data, self.config)

    def evaluate_on_clients(self, number: int) -> dict[str, float]:
        """Metrics that clients measure on their own data: as the strategy averages them, and over clients.

        All clients are asked, of more than 1,000 a sample of 1,000.
        """
        kind = MessageType.EVALUATE
        asked = list(self.configure(number, kind, self.draw(number, kind)))
        replies = self.grid.send_and_receive(asked, timeout=self.config.rounds.deadline_s)
        nodes = {message.metadata.dst_node_id for message in asked}
        return on_clients(self.chosen.strategy, number, replies, nodes, self.config)

    def now(self) -> float:
        """Seconds, by the clock that clients' work goes by."""
        return self.grid.elapsed_s if isinstance(self.grid, Simulated) else time.monotonic()

    def simulated_s(self) -> float | None:
        """Simulated seconds since the run began; None in real time."""
        return self.grid.elapsed_s if isinstance(self.grid, Simulated) else None

    def load_global(self) -> None:
        """Put the global state into the scratch model."""
        share_arrays(self.model.network, self.arrays)

    def commit(self, record: RoundRecord) -> None:
        """Make the round count."""
        parts = (self.downlink, self.pace, self.choice, self.frozen, self.teaching)
        memory = (dict(part.memory()) for part in parts if part is not None)
        state = capture(self.chosen.strategy, ChainMap(*memory))
        kept = {**self.arrays, **moments_arrays(self.instructions.moments)}
        self.model_sha256 = self.registry.commit_round(self.run_id, record, kept, state, self.about)
        self.records.append(record)


def _reseed(seed: int, number: int, purpose: str) -> None:
    """Flower samples clients from the global `random` and draws noise from numpy's global generator."""
    words = np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))


def _scalar(metrics: MetricRecord | None, key: str) -> float | None:
    value = None if metrics is None else metrics.get(key)
    return float(value) if isinstance(value, (int, float)) else None
