"""What befalls simulated clients: speeds, networks, absences, losses, attacks, changing data.

Everything is a function of (seed, client, round, simulated time), so that a million clients cost nothing and
the order of asking changes nothing. Only batteries remember: what committed rounds have cost.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from flwr.app import Message, MessageType

from fedge.config import Config
from fedge.config import Scenario as Settings
from fedge.dataset import Examples, Indices
from fedge.errors import ConfigError, DataError
from fedge.learning import messages
from fedge.learning.messages import Instructions
from fedge.learning.state import NamedArrays
from fedge.spec import Spec
from fedge_simulations.course import Fate, Ring
from fedge_simulations.scenario import drift
from fedge_simulations.scenario.attacks import attacked, attacked_labels
from fedge_simulations.scenario.backdoor import poisoned, target_of
from fedge_simulations.scenario.battery import Batteries
from fedge_simulations.scenario.collusion import agreed, colludes
from fedge_simulations.scenario.draws import Floats, Nodes
from fedge_simulations.scenario.events import EVENTS, Recorder, Recording, Sending
from fedge_simulations.scenario.traits import Of, Traits

__all__ = ["EVENTS", "Scenario", "attacked", "check"]

_LOOK: Final = 1 / 3  # of a training pass: one without a backward pass
_REASONS: Final = ("dropped out", "battery empty", "went offline")


class Scenario:
    """The course that `[scenario]` describes (fedge_simulations.course.Course)."""

    def __init__(
        self,
        config: Config,
        *,
        clients: int,
        labels: npt.NDArray[np.int64],
        trigger: float = 255.0,
        folder: Path | None = None,
    ) -> None:
        """Open the recording that is replayed, if any.

        Args:
            config: of the run.
            clients: how many there are.
            labels: of the whole data set.
            trigger: what a backdoor's pixel is set to.
            folder: where events.jsonl is written; None: nowhere.

        Raises:
            ConfigError: settings that contradict each other.
            DataError: the recording cannot be used.
        """
        settings = self.settings = config.scenario
        _check(config)
        self._labels, self._trigger = labels, trigger
        self._traits = Traits(settings, config.seed)
        self._replay = None if settings.replay is None else Recording(Path(settings.replay), clients=clients)
        if self._replay is not None and settings.battery_s is not None and not self._replay.has_work:
            raise ConfigError(
                f"scenario.battery_s: {settings.replay} was recorded without batteries; leave one of them out"
            )
        recorded = folder is not None and settings.record
        self._recorder = (
            Recorder(folder / EVENTS, clients=clients, seed=config.seed) if folder and recorded else None
        )
        self._batteries = None if settings.battery_s is None else Batteries(settings, self._traits.charge)
        self._round: int | None = None  # None: not begun
        self._worked: list[Sending] = []  # of the round, for the batteries
        self.pause_s = settings.pause_s
        drawn = frozenset(settings.attacks if settings.attackers else ())
        self.kinds = drawn if self._replay is None else frozenset(self._replay.kinds)  # of attacks
        self.attacks = bool(self.kinds)
        self._agreed: dict[str, tuple[Ring, NamedArrays]] = {}  # by attack: what its last ring has agreed on
        changing = {kind for kind in self.kinds if kind.partition(":")[0] not in ("label_flip", "backdoor")}
        if changing and config.communication.codec:
            raise ConfigError(
                f"communication.codec: {min(changing)!r} of scenario.attackers changes arrays on their "
                "way, and a codec sends none; leave one of them out"
            )

    def begin_round(self, number: int) -> None:
        """Let what earlier rounds did count, and forget what was recorded of this one or a later one.

        Raises:
            DataError: the record of the rounds before cannot be read, and batteries need it.
        """
        if self._round is None:
            kept = self._recorder.resume(number) if self._recorder is not None else []
            if number > 1 and self._batteries is not None and not kept:
                raise DataError(
                    f"scenario.battery_s: {EVENTS} of the rounds before {number} is gone from the run "
                    "folder; begin the run anew"
                )
            self._worked = kept
        if number != self._round:
            self._settle()
        self._round = number

    def _settle(self) -> None:
        if self._batteries is not None:
            for sent in self._worked:
                until = [
                    sent.clock_s + (f.arrives_s if math.isfinite(f.arrives_s) else 0) for f in sent.fates
                ]
                work = sent.work_s or [0.0] * len(sent.client)
                self._batteries.drain(sent.client, work, until, sent.clock_s)
        self._worked = []

    def fate(
        self,
        node_id: int,
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: int,
        bytes_down: int,
        bytes_up: int,
        passes: int = 1,
    ) -> Fate:
        """What becomes of one message; nothing is recorded."""
        found, _ = self._decide([node_id], kind, round, clock_s, [examples], bytes_down, bytes_up, passes)
        return found[0]

    def fates(
        self,
        node_ids: Sequence[int],
        *,
        kind: str,
        round: int,  # noqa: A002 - the word of the domain
        clock_s: float,
        examples: Sequence[int],
        bytes_down: int,
        bytes_up: int,
        passes: int = 1,
    ) -> list[Fate]:
        """What becomes of messages that are sent together, each as `fate` says; it is recorded.

        Raises:
            RoundError: they are not in the recording that is replayed.
            DataError: events.jsonl cannot be written.
        """
        found, work = self._decide(node_ids, kind, round, clock_s, examples, bytes_down, bytes_up, passes)
        told = work if self._batteries is not None else None
        sending = Sending(round, kind, clock_s, node_ids, found, told)
        if self._recorder is not None:
            self._recorder.append(sending)
        if self._batteries is not None:
            self._worked.append(sending)
        return found

    def _decide(
        self,
        node_ids: Sequence[int],
        kind: str,
        number: int,
        clock_s: float,
        examples: Sequence[int],
        bytes_down: int,
        bytes_up: int,
        passes: int,
    ) -> tuple[list[Fate], list[float]]:
        """The fates, and how many seconds each client works."""
        if self._replay is not None:
            return self._replay.fates(number, kind, node_ids)
        nodes = np.asarray(node_ids, dtype=np.int64)
        words = (number, zlib.crc32(kind.encode()))
        latency, speed = self._traits.latency(nodes), self._traits.bandwidth(nodes)
        down = latency + _seconds(bytes_down, self.settings.down_bytes_per_s, speed)
        up = latency + _seconds(bytes_up, self.settings.up_bytes_per_s, speed)
        each = passes if kind == MessageType.TRAIN else _LOOK
        work = self._work(nodes, each, np.asarray(examples, dtype=np.int64), clock_s, words)
        whole = down + work + up
        ends, reasons = self._losses(nodes, down, work, whole, clock_s, words)
        attacks = (
            self._traits.attacks(nodes) if kind == MessageType.TRAIN else np.full(len(nodes), "")
        ).tolist()
        fates = [Fate(*each) for each in zip(ends.tolist(), reasons, attacks, strict=True)]
        return fates, np.clip(ends - down, 0.0, work).tolist()

    def _work(
        self,
        nodes: Nodes,
        passes: float,
        examples: npt.NDArray[np.int64],
        clock_s: float,
        words: tuple[int, ...],
    ) -> Floats:
        """(K,) seconds of computing."""
        settings = self.settings
        counts = drift.held(settings, examples, clock_s)
        work: Floats = counts * (settings.seconds_per_example * passes) * self._traits.slowness(nodes)
        if settings.stragglers:
            slow = self._traits.uniform(nodes, Of.STRAGGLES, *words) < settings.stragglers
            work = np.where(slow, work * settings.straggler_factor, work)
        return work

    def _losses(
        self,
        nodes: Nodes,
        down: Floats,
        work: Floats,
        whole: Floats,
        clock_s: float,
        words: tuple[int, ...],
    ) -> tuple[Floats, list[str]]:
        """When the server hears from each, and why it hears of a loss; of several causes the first counts."""
        settings, traits = self.settings, self._traits
        never = np.full(len(nodes), np.inf)
        dropped, empty = never, never
        if settings.dropouts:
            falls = traits.uniform(nodes, Of.DROPS, *words) < settings.dropouts
            dropped = np.where(falls, whole * traits.uniform(nodes, Of.DROPS_AT, *words), np.inf)
        if self._batteries is not None:
            lasts = self._batteries.lasts(nodes, clock_s)
            empty = np.where(lasts < work, down + lasts, np.inf)
        remaining = traits.remaining(nodes, clock_s)
        offline = np.where(remaining < whole, remaining, np.inf)
        offline = np.where(remaining == 0, 0.0, offline)  # also where nothing takes any time
        causes = np.stack([dropped, empty, offline])  # (causes, K)
        first, when = causes.argmin(axis=0), causes.min(axis=0)
        silent = traits.silent(nodes)
        lost = np.isfinite(when) & ~silent
        reasons = [_REASONS[i] if gone else "" for i, gone in zip(first.tolist(), lost.tolist(), strict=True)]
        return np.where(silent, np.inf, np.where(lost, when, whole)), reasons

    def online(self, node_ids: Sequence[int], clock_s: float) -> list[int]:
        """Those that have joined, are in their window and have the charge to take part, in the same order."""
        nodes = np.asarray(node_ids, dtype=np.int64)
        there = self._traits.remaining(nodes, clock_s) > 0
        if self._batteries is not None:
            there &= self._batteries.enough(nodes, clock_s)
        found: list[int] = nodes[there].tolist()
        return found

    def examples(self, node_id: int, indices: Indices, *, round: int, clock_s: float) -> Indices:  # noqa: A002
        """What the client holds then, of all that it ever holds."""
        if self.settings.data == "all":
            return indices
        key = self._traits.key(Of.DATA, node_id)
        return drift.part(self.settings, indices, self._labels, key=key, clock_s=clock_s)

    def believed(
        self,
        node_id: int,
        own: Examples,
        classes: int,
        *,
        round: int,  # noqa: A002 - the word of the domain
    ) -> Examples:
        """What the client takes for its examples."""
        if not self.attacks:
            return own
        if self._replay is not None:
            attack = self._replay.attack_of(round, node_id)
        else:
            attack = str(self._traits.attacks(np.array([node_id]))[0])
        if (target := target_of(attack)) is not None:
            return poisoned(own, target, self._trigger)
        return replace(own, y=attacked_labels(own.y, classes)) if attack == "label_flip" else own

    def attack(self, fate: Fate, sent: Message, reply: Message, ring: Callable[[], Ring]) -> Message:
        """The answer of a client whose fate names an attack."""
        asked = Instructions.of(sent)
        record = messages.arrays_named(reply.content, messages.ARRAYS)
        state = messages.from_record(messages.arrays_named(sent.content, messages.ARRAYS))
        start = {} if asked.update == "gradient" else state
        if colludes(fate.attack):
            changed = self._agreed_on(fate.attack, start, ring())
        else:
            seed = self._traits.key(Of.NOISE, sent.metadata.dst_node_id, asked.round)
            changed = attacked(messages.from_record(record), start, fate.attack, seed)
        reply.content[messages.ARRAYS] = messages.to_record(changed, shared=False)
        return reply

    def _agreed_on(self, attack: str, start: NamedArrays, ring: Ring) -> NamedArrays:
        """What each of a ring sends, worked out once: arrays of its own, which a strategy may write to."""
        known = self._agreed.get(attack)
        if known is None or known[0] is not ring:
            answers = [messages.from_record(answer) for answer in ring.answers]
            known = self._agreed[attack] = (ring, agreed(answers, start, attack, ring.asked))
        return {name: value.copy() for name, value in known[1].items()}


def _seconds(size: int, bytes_per_s: float | None, speed: Floats) -> Floats:
    """(K,) to carry so many bytes at a client's share of the median bandwidth."""
    return np.zeros(len(speed)) if bytes_per_s is None else size / (bytes_per_s * speed)


def _check(config: Config) -> None:
    settings = config.scenario
    if settings.attackers and not settings.attacks:
        raise ConfigError("scenario.attacks: name what scenario.attackers do, such as ['sign_flip']")
    if settings.replay is not None and (config.evaluate.leave_one_client_out or config.evaluate.folds):
        raise ConfigError(
            "scenario.replay: a recording has all clients; leave folds and leave_one_client_out out"
        )
    if settings.battery_s is not None and not settings.record:
        raise ConfigError(
            "scenario.record = false: batteries need the record to go on after an interruption; leave it out"
        )


def check(config: Config, clients: int, spec: Spec) -> None:
    """Refuse a scenario that cannot be played, before anything is written.

    Raises:
        ConfigError: settings that contradict each other, or the data.
        DataError: the recording cannot be used.
    """
    for attack in sorted(Scenario(config, clients=clients, labels=np.zeros(0, np.int64)).kinds):
        target = target_of(attack)
        if target is not None and (spec.kind != "image" or target >= spec.classes):
            raise ConfigError(
                f"scenario.attacks: {attack!r} is a pixel on images that leads to a class from 0 to "
                f"{spec.classes - 1}, and the data are {spec.kind}; take another class or attack"
            )


def plain(settings: Settings) -> bool:
    """Whether clients differ in nothing and nothing befalls them, which needs no simulated clock."""
    pace = Settings(seconds_per_example=settings.seconds_per_example, record=settings.record)
    return settings == pace
