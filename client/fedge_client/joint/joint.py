"""Local answer first, then perhaps the cloud's, and in any case one answer by the deadline."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError, FedgeError, FormatError, LateError, UserError
from fedge.fitting import fit
from fedge.manifest import VariantEntry
from fedge.routing import KEY, Routing, Rule, Wanted, chosen
from fedge.spec import Spec
from fedge.wire import MAX_MESSAGE_BYTES
from fedge_client.joint.breaker import Breaker, BreakerSettings
from fedge_client.joint.budget import Bucket, Budget, take
from fedge_client.runtime import Prediction, Runtime
from fedge_client.serving.holder import Holder

log = logging.getLogger("fedge.serving")

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Source = Literal["device", "cloud"]
Failure = Literal["late", "refused", "busy", "down", "version", "garbage"]
Why = Literal["alone", "uncalibrated", "sure", "asked", "private", "budget", "large", "open"] | Failure

MOST_EXAMPLES: Final = 256  # of a question, as a hub takes them unless told otherwise
MOST_BYTES: Final = MAX_MESSAGE_BYTES - 64 * 1024  # of its examples


class CloudError(FedgeError):
    """The cloud did not answer."""

    def __init__(self, why: Failure, message: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True, slots=True)
class CloudAnswer:
    """What the cloud said of a batch, held to the spec by whoever received it."""

    probabilities: Float32  # (B, classes)
    version: int  # of the release whose global model has answered
    model: str  # SHA-256 of its file


class Cloud(Protocol):
    """The global model, somewhere else."""

    async def ask(self, x: Array, spec: Spec, version: int, timeout_s: float) -> CloudAnswer:
        """Its answer to a batch (B, *spec.shape); raises CloudError when there is none in time."""


@dataclass(frozen=True, slots=True)
class JointSettings:
    """Who answers what."""

    rule: Rule | None = None  # None: what the release carries
    wanted: Wanted = field(default_factory=Wanted)  # of what the release carries
    private: bool = False  # no input ever leaves this device, in whatever form
    deadline_s: float = 0.5  # of a request that names none
    reserve_s: float = 0.02  # before the deadline, when the cloud is waited for no more
    at_once: int = 8  # questions that are open; others wait, within their deadline
    waiting: int = 64  # requests that wait for the cloud, those included; others are answered here at once
    budget: Budget = field(default_factory=Budget)
    breaker: BreakerSettings = field(default_factory=BreakerSettings)

    def __post_init__(self) -> None:
        """Refuse nonsense on construction.

        Raises:
            UserError: times that leave no time for the cloud, or no question at all.
        """
        if min(self.at_once, self.waiting) < 1:
            raise UserError(
                f"joint: at_once is {self.at_once}, waiting {self.waiting}; each must be 1 or more"
            )
        if not 0 < self.reserve_s < self.deadline_s:
            raise UserError(
                f"joint: reserve_s ({self.reserve_s}) must be above 0, below deadline_s ({self.deadline_s})"
            )


@dataclass(frozen=True, slots=True)
class Answer:
    """One example's answer, and who gave it."""

    prediction: Prediction
    source: Source
    why: Why  # "sure" and "asked" are the rule's; the others say why the cloud was not asked, or has failed
    version: int  # of the release that has answered
    model: str  # SHA-256 of the variant's installed bytes, or of the global model's file


@dataclass(frozen=True, slots=True)
class Local:
    """What the device has answered to a batch, before anybody else is asked."""

    x: Array  # (B, *spec.shape), as the spec says
    predictions: Sequence[Prediction]
    spec: Spec
    version: int  # of the release
    model: str  # SHA-256 of the variant's installed bytes
    entry: VariantEntry  # of the variant

    @classmethod
    def of(cls, runtime: Runtime, x: Array, predictions: Sequence[Prediction]) -> Local:
        """What a runtime has answered."""
        entry = runtime.installed.entry
        return cls(x, predictions, runtime.spec, runtime.release.version, entry.installed_sha256, entry)

    def alone(self, why: Why) -> list[Answer]:
        """All of it, for one reason."""
        return [Answer(each, "device", why, self.version, self.model) for each in self.predictions]


class Joint:
    """Answers by device and cloud together; of one event loop.

    Args:
        holder: the installed variant.
        cloud: the global model; None: there is none, and the device answers all.
        settings: who answers what.
        clock: seconds, monotonic.
        rng: for the breaker's pauses.
    """

    def __init__(
        self,
        holder: Holder[Runtime],
        cloud: Cloud | None,
        settings: JointSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._holder, self._cloud, self._settings, self._clock = holder, cloud, settings, clock
        self._rng = rng or random.Random()  # noqa: S311 - pauses, no secret
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="joint")
        self._bucket = Bucket(settings.budget.burst, clock())
        self._breaker = Breaker()
        self._places = asyncio.Semaphore(settings.at_once)
        self._asking: set[asyncio.Task[CloudAnswer]] = set()
        self._rules: tuple[VariantEntry, Rule | None] | None = None  # as last read
        self.counts: Counter[str] = Counter()  # examples by `why`

    @property
    def deadline_s(self) -> float:
        """Of a request that names none."""
        return self._settings.deadline_s

    @property
    def breaker(self) -> Literal["closed", "open", "trial"]:
        """Whether the cloud is asked, or left alone for now; a trial decides."""
        if not self._breaker.opened:
            return "closed"
        return "trial" if self._breaker.trial else "open"

    async def close(self) -> None:
        """End what is under way to the cloud."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        self._executor.shutdown(cancel_futures=True)

    async def infer(self, x: Array, deadline_s: float | None = None) -> list[Answer]:
        """One answer for each example of x: a batch (B, *spec.shape), or one example (*spec.shape).

        The cloud is waited for until `reserve_s` before the deadline; then the device's own answer is given.

        Raises:
            LateError: not even the device had an answer by the deadline.
            AbsentError: nothing is installed.
            DataError: x does not fit.
        """
        seconds = self._settings.deadline_s if deadline_s is None else deadline_s
        until = self._clock() + seconds
        work = asyncio.get_running_loop().run_in_executor(self._executor, self._answer, x, until)
        work.add_done_callback(_seen)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                local = await asyncio.shield(work)
        except TimeoutError as error:
            raise LateError(f"the device has no answer within {seconds:.3g} s") from error
        return await self.complete(local, until)

    def _answer(self, x: Array, until: float) -> Local:
        if self._clock() > until:
            raise LateError("the deadline has passed")
        with self._holder.lease() as runtime:
            batch = fit(x, runtime.spec)
            if not len(batch):
                raise DataError("holds no example")
            return Local.of(runtime, batch, runtime.infer(batch))

    async def complete(self, local: Local, until: float) -> list[Answer]:
        """The device's answers, with the cloud's in place of those that are doubted.

        Args:
            local: what the device has answered.
            until: when the caller must have it, by this object's clock; the cloud is waited for until
                `reserve_s` before.
        """
        answers = await self._completed(local, until)
        self.counts.update(answer.why for answer in answers)
        return answers

    def _rule(self, entry: VariantEntry) -> Rule | None:
        """What decides for a variant; None: nothing does, so nothing is asked."""
        if self._settings.rule is not None:
            return self._settings.rule
        if self._rules is None or self._rules[0] is not entry:
            rule, why = carried_rule(entry, self._settings.wanted)
            if why:
                log.warning("the cloud is not asked: %s; see rule, share and accuracy in [joint]", why)
            self._rules = entry, rule
        return self._rules[1]

    async def _completed(self, local: Local, until: float) -> list[Answer]:
        rule = self._rule(local.entry)
        if rule is None:
            return local.alone("uncalibrated")
        why: list[Why] = ["sure"] * len(local.x)
        doubts = rule.doubts(
            np.array([list(p.probabilities.values()) for p in local.predictions], np.float32)
        )
        doubted = chosen(doubts, rule.threshold, len(doubts))
        found: dict[int, Prediction] = {}
        reply: CloudAnswer | None = None
        if len(doubted):
            wait_s = until - self._settings.reserve_s - self._clock()
            granted, left = self._permitted(len(doubted), local.x[0].nbytes, wait_s)
            sent = chosen(doubts, rule.threshold, granted)
            for i in doubted:
                why[i] = left
            if len(sent):
                reply, reason = await self._asked(local, sent, wait_s)
                for place, i in enumerate(sent):
                    why[i] = reason
                    if reply is not None:
                        found[int(i)] = _prediction(reply.probabilities[place], local.spec)
        return [self._one(local, i, found.get(i), reply, why[i]) for i in range(len(local.x))]

    @staticmethod
    def _one(local: Local, i: int, found: Prediction | None, reply: CloudAnswer | None, why: Why) -> Answer:
        if found is None or reply is None:
            return Answer(local.predictions[i], "device", why, local.version, local.model)
        return Answer(found, "cloud", why, reply.version, reply.model)

    def _permitted(self, doubted: int, nbytes: int, wait_s: float) -> tuple[int, Why]:
        """How many may be sent, of so many bytes each, and why the others are not."""
        settings = self._settings
        wanted = min(doubted, MOST_EXAMPLES, MOST_BYTES // max(nbytes, 1))
        if settings.private or self._cloud is None:
            return 0, "private"
        if not wanted:
            return 0, "large"
        if wait_s <= 0:
            return 0, "late"
        if len(self._asking) >= settings.waiting:
            return 0, "busy"
        now = self._clock()
        granted, bucket = take(settings.budget, self._bucket, wanted, now)
        if not granted:
            return 0, "budget"
        goes, self._breaker = self._breaker.ask(settings.breaker, now)
        if not goes:
            return 0, "open"
        self._bucket = bucket
        return granted, "large" if granted == wanted else "budget"

    async def _question(self, local: Local, sent: npt.NDArray[np.intp], until: float) -> CloudAnswer:
        if self._cloud is None:
            raise AssertionError
        async with self._places:
            wait_s = until - self._clock()
            return await self._cloud.ask(local.x[sent], local.spec, local.version, max(wait_s, 0.001))

    async def _asked(
        self, local: Local, sent: npt.NDArray[np.intp], wait_s: float
    ) -> tuple[CloudAnswer | None, Why]:
        """The cloud's answer, or why there is none; whatever it does, not later than `wait_s` from now."""
        task = asyncio.create_task(self._question(local, sent, self._clock() + wait_s))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        task.add_done_callback(_seen)
        try:
            await asyncio.wait({task}, timeout=wait_s)
            why: Why = "asked"
            if not task.done():
                why = "late"
            elif task.cancelled():
                why = "down"
            elif (error := task.exception()) is not None:
                why = error.why if isinstance(error, CloudError) else "down"
            elif task.result().probabilities.shape != (len(sent), local.spec.classes):
                why = "garbage"
        finally:
            task.cancel()  # it is not waited for: a call that does not end must not hold up the answer
        if why == "asked":
            self._breaker = self._breaker.succeeded()
            return task.result(), why
        self._breaker = self._breaker.failed(self._settings.breaker, self._clock(), self._rng.random())
        return None, why


def carried_rule(entry: VariantEntry, wanted: Wanted) -> tuple[Rule | None, str]:
    """The rule that a release carries for a variant; else None, and why there is none.

    Args:
        entry: of the variant.
        wanted: which one of them.
    """
    said = entry.evidence.get(KEY)
    if said is None:
        return None, "this release carries no threshold"
    try:
        return Routing.from_json(said).wanted(wanted), ""
    except (FormatError, DataError) as error:
        return None, str(error)


def _prediction(row: Float32, spec: Spec) -> Prediction:
    probabilities = dict(zip(spec.labels, map(float, row), strict=True))
    label = spec.labels[int(row.argmax())]
    return Prediction(label, probabilities[label], probabilities)


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
