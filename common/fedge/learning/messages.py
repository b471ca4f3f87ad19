"""The one typed view of what server and clients say to each other inside Flower messages.

| message type | server sends | client replies |
|---|---|---|
| query.ping | nothing | metrics: num-examples, 0 |
| query.moments | config | moments (arrays), metrics: num-examples |
| train | arrays (global state), config | arrays (state, or gradients), metrics: num-examples, train_loss |
| evaluate | arrays (global state), config | metrics: num-examples, loss, accuracy, and held-out where told |

What travels besides for some strategies is in `terms`. Keys that Flower's own strategies add to the config
(`server-round`, `proximal-mu`) are read here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedge.codecs.chain import Codec
from fedge.config import FilterName, Train, parse_train
from fedge.errors import FormatError
from fedge.learning.guard import KINDS, Guard
from fedge.learning.state import digest
from fedge.learning.terms import FROZEN, PLAIN, TEACHER, VOID, Terms
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.wire.arrays import MemoryArray, put, records_of

ARRAYS, CONFIG, METRICS, MOMENTS = "arrays", "config", "metrics", "moments"
EXAMPLES, TRAIN_LOSS = "num-examples", "train_loss"  # Flower's own default names
GUARDED = "guarded"  # 1: the client has protected itself as it was told to
HELD_OUT = "held-out"  # 1: evaluated on examples that the client keeps back from training
CLIENTS = "clients"  # how many clients' updates a partial sum holds; in no client's own answer
CODED = "coded"  # the one array of an update in a codec (`fedge.codecs.update`)
MOST_EXAMPLES = "most-examples"  # that a client trains on in this round
HOLDS_FROZEN = "holds-frozen"  # 1: the client keeps the frozen arrays; only where it was asked to
STATE_BYTES = "state-bytes"  # of the state that a change stands for
MAX_EXAMPLES = 10**9  # of one client: keeps sums exact; it is no defence against a client that lies
QUERY_MOMENTS = "query.moments"
QUERY_PING = "query.ping"  # touches neither task nor data: for checks and measurements

Update = Literal["weights", "gradient"]
T = TypeVar("T", int, float)
NamedArrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a client must know to take part; the same for every client of a round."""

    task: str  # the client offers it under this name, or refuses
    spec: Spec  # the run's input and labels; a client's data must fit it
    model: str  # architecture of the global model
    noise_filter: FilterName
    moments: Moments | None  # federated; None while they are still being asked for, or switched off
    train: Train
    seed: int
    update: Update  # what the strategy aggregates
    round: int = 0  # 0 before the first
    proximal_mu: float = 0.0  # FedProx's mu; 0: no such term
    task_digest: str = ""  # the client's must be the same (fedge.task_digest); empty: not checked
    guard: Guard | None = None  # how the client protects what it sends; None: not at all
    holdout: float = 0.0  # share of its examples that the client keeps back from training, to evaluate on
    most_examples: int | None = None  # that this client trains on, drawn anew each round; None: on all
    terms: Terms = PLAIN  # what the strategy asks for besides
    void: int | None = None  # what this client sent from that round on was not counted; None: all was
    codec: Codec | None = None  # what it does to its change then; None: it sends all of it
    downlink: Codec | None = None  # the client keeps the state, of which the next change may be sent in this
    frozen_sum: int | None = None  # of the frozen arrays, which the client keeps; None: they come each time
    change: tuple[int, int] | None = None  # this is one: checksums of the states that it leads from and to

    def to_config(self) -> ConfigRecord:
        """The record that a strategy hands to its clients."""
        record = ConfigRecord(
            {
                "task": self.task,
                "spec": json.dumps(self.spec.to_json()),
                "model": self.model,
                "filter": self.noise_filter,
                "train": _train_json(self.train),
                "seed": self.seed,
                "update": self.update,
                "server-round": self.round,
                "task-digest": self.task_digest,
            }
        )
        if self.moments is not None:
            for name in ("count", "total", "squares"):
                record[f"moments-{name}"] = [float(value) for value in getattr(self.moments, name)]
        if self.holdout:
            record["holdout"] = self.holdout
        if self.guard is not None:
            record["guard"] = self.guard.kind
            record["guard-clip-norm"] = self.guard.clip_norm
            record["guard-noise-multiplier"] = self.guard.noise_multiplier
            record["guard-min-examples"] = self.guard.min_examples
            if self.guard.kind == "distributed":
                record["guard-least"] = self.guard.least
        record.update(self.terms.said())
        if self.void is not None:
            record[VOID] = self.void
        if self.codec is not None:
            record["codec"] = self.codec.text
            record["codec-feedback"] = self.codec.feedback
        if self.downlink is not None:
            record["downlink"] = self.downlink.text
        if self.frozen_sum is not None:
            record[_FROZEN_SUM] = self.frozen_sum
        return record

    @classmethod
    def of(cls, message: Message) -> Instructions:
        """Read a message's config, which came over a network.

        Raises:
            FormatError: a key is absent or of another type.
            ConfigError: the train settings are out of range.
        """
        try:
            return cls.of_config(records_of(message.content, ConfigRecord)[CONFIG])
        except (KeyError, ValueError, RecursionError) as error:
            raise FormatError(f"message: config is malformed ({type(error).__name__}: {error})") from error

    @classmethod
    def of_config(cls, config: ConfigRecord) -> Instructions:
        """Read a record that `to_config` made.

        Those read last are given where the record says the same: thousands of simulated clients get one.

        Raises:
            KeyError, ValueError: it is none; from outside, use `of`.
        """
        last = _LAST.get(cls)
        said = {  # copies of lists: a record may be changed in place; types: True is equal to 1
            key: (type(value), list(value) if isinstance(value, list) else value)
            for key, value in config.items()
        }
        if last is None or last[0] != said:
            last = _LAST[cls] = (said, cls._read(config))
        return last[1]

    @classmethod
    def _read(cls, config: ConfigRecord) -> Instructions:
        update, noise_filter = config["update"], config["filter"]
        if update not in get_args(Update) or noise_filter not in get_args(FilterName):
            raise ValueError(f"update {update!r}, filter {noise_filter!r}")
        spec = Spec.from_json(json.loads(_text(config, "spec")))
        return cls(
            task=_text(config, "task"),
            spec=spec,
            model=_text(config, "model"),
            noise_filter=noise_filter,  # type: ignore[arg-type]  # checked above
            moments=_moments(config, spec),
            train=parse_train(_text(config, "train")),
            seed=_number(config, "seed", int),
            update=update,  # type: ignore[arg-type]  # checked above
            round=_number(config, "server-round", int),
            proximal_mu=float(_number(config, "proximal-mu", float)) if "proximal-mu" in config else 0.0,
            task_digest=_text(config, "task-digest") if "task-digest" in config else "",
            guard=_guard(config) if "guard" in config else None,
            holdout=_share(config, "holdout") if "holdout" in config else 0.0,
            terms=Terms.of(config),
            most_examples=max(_number(config, MOST_EXAMPLES, int), 1) if MOST_EXAMPLES in config else None,
            void=_number(config, VOID, int) if VOID in config else None,
            codec=codec_of(config),
            downlink=_codec(config, "downlink") if "downlink" in config else None,
            frozen_sum=_number(config, _FROZEN_SUM, int) if _FROZEN_SUM in config else None,
            change=_change(config) if "change-to" in config else None,
        )


_FROZEN_SUM = "frozen-sum"
_LAST: dict[type[Instructions], tuple[dict[str, Any], Instructions]] = {}  # the record read last


def _train_json(train: Train) -> str:
    from pydantic import TypeAdapter

    # Clients are told the names that patterns match: these are the model's, and not the configuration's; and
    # of a schedule, what it comes to in this round.
    return TypeAdapter(Train).dump_json(train, exclude={"freeze", "schedule"}).decode()


def _text(config: ConfigRecord, key: str) -> str:
    value = config[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}, not text")
    return value


def _number(config: ConfigRecord, key: str, kind: type[T]) -> T:
    value = config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{key} is a {type(value).__name__}, not a number")
    if not 0 <= value < 2**63:  # NaN neither
        raise ValueError(f"{key} = {value} is out of range")
    return kind(value)


def _share(config: ConfigRecord, key: str) -> float:
    value = _number(config, key, float)
    if not value < 1:
        raise ValueError(f"{key} = {value}: must be below 1")
    return value


def _guard(config: ConfigRecord) -> Guard:
    kind = config["guard"]
    if kind not in KINDS:
        raise ValueError(f"guard {kind!r} is not known here")
    clip_norm = _number(config, "guard-clip-norm", float)
    noise_multiplier = _number(config, "guard-noise-multiplier", float)
    if not (clip_norm > 0 and noise_multiplier > 0):
        raise ValueError(f"guard with clip norm {clip_norm} and noise {noise_multiplier}: must be above 0")
    examples = _number(config, "guard-min-examples", int)
    least = max(_number(config, "guard-least", int), 1) if kind == "distributed" else 1
    return Guard(kind, clip_norm, noise_multiplier, examples, least)  # type: ignore[arg-type]  # checked above


def frozen_of(message: Message, terms: Terms) -> dict[str, npt.NDArray[np.generic]]:
    """The entries of the global state that a message brought and that do not come back.

    Raises:
        FormatError: they are absent, or others than the terms say.
    """
    if not terms.frozen:
        return {}
    found = from_record(arrays_named(message.content, FROZEN))
    if set(found) != set(terms.frozen):
        raise FormatError("message: the frozen arrays are not those that the terms name")
    return found


def teacher_of(message: Message, terms: Terms) -> dict[str, npt.NDArray[np.generic]] | None:
    """The state of a lesson's teacher that a message brought; None: it brought none.

    Raises:
        FormatError: it is another one than the lesson names.
    """
    if terms.lesson is None or TEACHER not in records_of(message.content, ArrayRecord):
        return None
    found = from_record(arrays_named(message.content, TEACHER))
    if digest(found) != terms.lesson.digest:
        raise FormatError("message: the teacher is not the one that the lesson names")
    return found


def codec_of(config: ConfigRecord) -> Codec | None:
    """The codec that a message asks for, if any.

    Raises:
        KeyError, ValueError: it is none that is known here.
    """
    if "codec" not in config:
        return None
    feedback = config["codec-feedback"]
    if not isinstance(feedback, bool):
        raise ValueError(f"codec-feedback is a {type(feedback).__name__}, not true or false")
    return _codec(config, "codec", feedback=feedback)


def _codec(config: ConfigRecord, key: str, *, feedback: bool = True) -> Codec:
    try:
        return Codec.parse(_text(config, key), feedback=feedback)
    except ValueError as error:
        raise ValueError(f"{key} {config[key]!r} is not known here: {error}") from error


def change_values(change: tuple[int, int], state_bytes: int) -> dict[str, int]:
    """What the config says besides where a change stands in the state's place.

    Args:
        change: as in `Instructions`.
        state_bytes: of the state that is not sent.
    """
    return {"change-from": change[0], "change-to": change[1], STATE_BYTES: state_bytes}


def _change(config: ConfigRecord) -> tuple[int, int]:
    return _number(config, "change-from", int), _number(config, "change-to", int)


def _moments(config: ConfigRecord, spec: Spec) -> Moments | None:
    if "moments-count" not in config:
        return None
    parts = [
        np.asarray(config[f"moments-{name}"], dtype=np.float64) for name in ("count", "total", "squares")
    ]
    for part in parts:
        if part.shape != (spec.channels,) or not np.isfinite(part).all():
            raise ValueError(f"moments are not {spec.channels} finite numbers")
    return Moments(*parts)


def arrays_named(content: RecordDict, name: str) -> ArrayRecord:
    """The array record of this name.

    Raises:
        FormatError: there is none.
    """
    found = records_of(content, ArrayRecord)
    if name not in found:
        raise FormatError(f"message: has no arrays named {name!r}")
    return found[name]


def to_record(arrays: NamedArrays, *, shared: bool = True) -> ArrayRecord:
    """Named arrays as Flower's record, names and order kept; nothing is copied or serialised.

    Args:
        arrays: become part of the record.
        shared: somebody else goes on using them, so who reads the record must not write to them; False
            gives the record writable arrays, as some of Flower's strategies need of updates.
    """
    record = ArrayRecord()
    put(record, {name: MemoryArray(np.asarray(value), shared=shared) for name, value in arrays.items()})
    return record


def from_record(
    record: MutableMapping[str, Array], *, consume: bool = False
) -> dict[str, npt.NDArray[np.generic]]:
    """Flower's record as named arrays; `np.load` inside refuses pickles.

    Args:
        record: Flower's, or a dict of its arrays; those that share memory with others come as views that
            cannot be written to.
        consume: take each array out of the record once it is read, so that no two copies of all exist.

    Raises:
        ValueError: bytes that are no array, or a file that cannot be read.
    """
    try:
        if consume:
            return {name: record.pop(name).numpy() for name in list(record)}
        return {name: array.numpy() for name, array in record.items()}
    except Exception as error:  # numpy reads a header with Python's tokenizer, which raises many kinds
        raise ValueError(f"not an array ({type(error).__name__}: {error})") from error
