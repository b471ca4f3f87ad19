"""A run's privacy between its rounds: the ledger is written first, the noise is drawn then."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from fedge.config import Config
from fedge.errors import BudgetError, ConfigError
from fedge.learning.dpsgd import Plan
from fedge.learning.guard import Guard
from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS, TRAIN_LOSS, to_record
from fedge.learning.state import NamedArrays
from fedge.noise import KEY_BYTES, derived_key
from fedge.wire.arrays import records_of
from fedge_server.privacy import accounting, rules
from fedge_server.privacy.accounting import Spend
from fedge_server.privacy.central import Arrays, ClippedSum, next_clip_norm
from fedge_server.registry.ledger import Entry, Ledger
from fedge_server.rounds.closing import Collected
from fedge_server.rounds.digests import arrays_sent, digest_of
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.sampling import cohort_size

SEED, SECRET = "seed", "secret"  # where noise comes from


@dataclass(slots=True)
class Protection:
    """What protects a run's rounds, and what has been spent."""

    config: Config
    ledger: Ledger
    run_id: str
    expected: int  # clients that each round counts on: the fixed denominator
    repeatable: bool  # a simulation: noise comes from the seed, and protects nobody
    clip_norm: float  # of the next round
    used_norm: float  # of the last one

    @classmethod
    def of(
        cls,
        config: Config,
        ledger: Ledger,
        run_id: str,
        *,
        population: int,
        simulated: bool,
        records: Sequence[RoundRecord],
    ) -> Protection | None:
        """What the configuration asks for, as of the last committed round; None when it asks for nothing.

        Raises:
            ConfigError: it does not fit the number of clients.
        """
        if config.privacy.mechanism == "none":
            return None
        fixed = config.privacy.mechanism in (
            "central",
            "distributed",
        )  # others divide by those who answered: the noise is in
        expected = expected_clients(config, population if simulated or not fixed else None)
        rules.check_population(config, expected, max(population, expected))
        clip_norm = config.privacy.clip_norm
        for record in records:
            clip_norm = float(record.privacy.get("next_clip_norm", clip_norm))
        return cls(config, ledger, run_id, expected, simulated, clip_norm, clip_norm)

    def afford(self, number: int) -> None:
        """Look before anybody is asked whether the budget reaches for a round.

        Raises:
            BudgetError: it does not; the line says what the round would bring epsilon to.
        """
        entries = self.ledger.entries()
        if self.repeatable and any((e.run_id, e.round) == (self.run_id, number) for e in entries):
            return  # it was spent before this run was interrupted, and the same noise comes again
        self._check(number, [*(entry.spend for entry in entries), self._spend])

    @property
    def central(self) -> bool:
        """Whether the server adds the noise; else each device does."""
        return self.config.privacy.mechanism == "central"

    @property
    def guard(self) -> Guard | None:
        """What devices are told to do, if it is they who add noise."""
        privacy = self.config.privacy
        if privacy.mechanism == "distributed":
            return rules.guard_of_shares(self.config, self.expected)
        if privacy.mechanism == "local" or privacy.mechanism == "example":
            return Guard(privacy.mechanism, privacy.clip_norm, privacy.noise_multiplier, privacy.min_examples)
        return None

    def before_asking(self, number: int) -> None:
        """Spend a round in which devices add the noise: what they answer has been seen, whatever comes of it.

        Raises:
            BudgetError: another run has used the budget up meanwhile.
        """
        if not self.central:
            self._write(number, f"{SEED}:devices" if self.repeatable else f"{SECRET}:{secrets.token_hex(16)}")

    def noised(
        self, number: int, updates: Iterable[Message], collected: Collected, reference: Arrays
    ) -> Message:
        """The round's updates as one message: their noised mean, whose digest takes the place of theirs.

        Args:
            number: of the round.
            updates: added up as they come.
            collected: what is known of them, once they have been gone through.
            reference: what changes are measured from.

        Raises:
            BudgetError: another run has used the budget up meanwhile.
        """
        settings = rules.settings_of(self.config, self.clip_norm, self.expected)
        total = ClippedSum(reference, settings)
        for update in updates:
            total.add(next(iter(records_of(update.content, ArrayRecord).values())))
        if self.repeatable:
            # Other updates must never get the same noise: the difference would show them bare.
            key = derived_key(self.config.seed, number, collected.updates)
            noise = f"{SEED}:{collected.updates[:48]}"
        else:
            key, noise = os.urandom(KEY_BYTES), f"{SECRET}:{secrets.token_hex(16)}"
        self._write(number, noise)
        found = total.noised(key)
        self.used_norm = self.clip_norm
        if found.unclipped is not None:
            privacy = self.config.privacy
            self.clip_norm = next_clip_norm(
                self.clip_norm,
                found.unclipped,
                quantile=privacy.clip_quantile,
                learning_rate=privacy.clip_learning_rate,
            )
        message = _message(found.mean)
        collected.digests = [digest_of(arrays_sent(message), message)]
        return message

    def of_round(self) -> Mapping[str, float | str]:
        """What a round's record says."""
        adaptive = {"next_clip_norm": self.clip_norm} if self.config.privacy.adaptive_clip else {}
        return {
            "epsilon": self.epsilon([entry.spend for entry in self.ledger.entries()]),
            "delta": self.config.privacy.delta,
            "clip_norm": self.used_norm,
            **adaptive,
            "noise": SEED if self.repeatable else SECRET,
        }

    def epsilon(self, spends: Sequence[Spend]) -> float:
        """What these releases cost whom the mechanism protects."""
        privacy = self.config.privacy
        return accounting.epsilon(spends, privacy.delta, unit=self._spend.unit, accountant=privacy.accountant)

    def _write(self, number: int, noise: str) -> None:
        entry = Entry(self.run_id, number, noise, self.config.privacy.mechanism, self._spend)
        self.ledger.spend(entry, lambda spends: self._check(number, spends))

    @property
    def _spend(self) -> Spend:
        """What a round costs whoever takes part in each of them.

        distributed: the server sees who answers, so that sampling amplifies nothing towards it.
        local: nothing is sure but what the device sends, so that its contribution may be any other, twice the
        clipping norm away. example: the plan of steps, which is the same for all devices.
        """
        rounds, train, privacy = self.config.rounds, self.config.train, self.config.privacy
        if privacy.mechanism == "local":
            return Spend("client", 1.0, privacy.noise_multiplier / 2)
        if privacy.mechanism == "example":
            plan = Plan.of(privacy.min_examples, train)
            return Spend("example", plan.sampling, privacy.noise_multiplier, plan.steps)
        if privacy.mechanism == "distributed":
            return Spend("client", 1.0, privacy.noise_multiplier)
        # A fixed number without replacement is counted as if everybody were asked each time.
        sampling = rounds.fraction if rounds.sampling == "poisson" else 1.0
        return Spend("client", sampling, self.config.privacy.noise_multiplier)

    def _check(self, number: int, spends: Sequence[Spend]) -> None:
        privacy, after = self.config.privacy, self.epsilon(spends)
        if after == math.inf:
            raise BudgetError(
                f"privacy.ledger = {privacy.ledger!r}: holds rounds that protect single examples alone, and "
                "nothing can be promised to its clients any more; name another one if these are others"
            )
        if privacy.max_epsilon is not None and after > privacy.max_epsilon:
            raise BudgetError(
                f"privacy.max_epsilon = {privacy.max_epsilon:g}: round {number} would bring epsilon to "
                f"{after:.3f} at delta {privacy.delta:g} in ledger {privacy.ledger!r}, which holds "
                f"{len(spends) - 1} rounds"
            )


def expected_clients(config: Config, population: int | None) -> int:
    """How many clients a round counts on, whoever is there.

    Args:
        config: of the run.
        population: of a simulation, where it never changes; None: devices, which come and go.

    Raises:
        ConfigError: nothing says how many devices there will be.
    """
    if population is not None:
        return cohort_size(population, config.rounds)
    if config.rounds.cohort is not None:
        return config.rounds.cohort
    if config.clients.count is None:
        raise ConfigError(
            "clients.count: with a privacy.mechanism the noised sum is divided by a number that is fixed "
            "beforehand; set clients.count, or rounds.cohort"
        )
    return cohort_size(config.clients.count, config.rounds)


def _message(arrays: NamedArrays) -> Message:
    metrics = MetricRecord({EXAMPLES: 1, TRAIN_LOSS: 0.0})  # every client weighs the same; losses stay away
    content = RecordDict({ARRAYS: to_record(arrays, shared=False), METRICS: metrics})
    return Message(content, 1, MessageType.TRAIN)
