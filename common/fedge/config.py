"""One typed configuration for a simulation and a deployment, checked in full before anything runs.

Units stand in the names (`_s`, `_ms`, `_bytes`); fractions are of 1. `docs/configuration.md` lists every
key with its default; a test holds the two together.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from fedge.codecs.chain import Codec
from fedge.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

# Strict: `true` is no number, and neither is "5".
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
NotNegative = Annotated[float, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=1, lt=2**53, strict=True)]
WholeOrNone = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # 0: chosen by fedge
Confidence = Annotated[float, Field(gt=0.5, lt=1, strict=True)]
Resamples = Annotated[int, Field(ge=200, le=100_000, strict=True)]

TierName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
LedgerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
TagName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]

LossName = Literal["cross_entropy", "focal", "multi_margin"]
OptimizerName = Literal["sgd", "adam", "adamw", "rmsprop"]
FilterName = Literal["none", "median", "gaussian", "clip"]
FormName = Literal["fp32", "int8", "w8", "w4", "ternary", "binary"]
MetricName = Literal["accuracy", "macro_f1", "auc", "recall"]
DataKind = Literal["labelled", "unlabelled", "clients", "none"]  # what compression learns from
AccountantName = Literal["pld", "rdp"]
PrecisionName = Literal["auto", "fp32", "bf16"]
PruneKind = Literal["structured", "unstructured"]

_AUGMENT = re.compile(r"(flip|shift:[1-9]\d?|noise:(0?\.\d+|\d+(\.\d+)?)|mask:0?\.\d+)")
_PARTITION = re.compile(
    r"(iid|natural|dirichlet:(?=.*[1-9])(\d+(\.\d+)?|\.\d+)|shards:[1-9]\d*"
    r"|draw:[1-9]\d{0,8}(:(?=.*[1-9])(\d+(\.\d+)?|\.\d+))?)"
)
_NUMBER = r"\d+(\.\d+)?"
ATTACK = re.compile(
    rf"(sign_flip|nan|label_flip|free_rider|mimic|scale:-?{_NUMBER}|noise:{_NUMBER}|ipm:{_NUMBER}"
    rf"|alie(:{_NUMBER})?|backdoor:\d{{1,5}})"
)
_TARGET = re.compile(r"(accuracy|macro_f1|auc|loss)\s*(>=|<=)\s*(\d*\.?\d+)")


def _matching(pattern: re.Pattern[str], forms: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"must be one of {forms}")
        return value

    return AfterValidator(check)


def _parses_as_codec(stages: tuple[str, ...]) -> tuple[str, ...]:
    if stages:
        Codec.of(stages)
    return stages


Augmentation = Annotated[str, _matching(_AUGMENT, "'flip', 'shift:PIXELS', 'noise:STD', 'mask:SHARE'")]
PartitionName = Annotated[
    str,
    _matching(_PARTITION, "'iid', 'natural', 'dirichlet:ALPHA', 'shards:PER_CLIENT', 'draw:SIZE[:ALPHA]'"),
]
Attack = Annotated[
    str,
    _matching(
        ATTACK,
        "'sign_flip', 'scale:FACTOR', 'noise:STD', 'nan', 'label_flip', 'free_rider', 'ipm:EPSILON', 'alie', "
        "'alie:Z', 'mimic', 'backdoor:CLASS'",
    ),
]


@dataclass(frozen=True, slots=True, config=_STRICT)
class Target:
    """A metric of the global model and the value that ends training."""

    metric: str
    at_least: bool
    value: float

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of a round satisfy it; a metric that is absent does not."""
        value = metrics.get(self.metric)
        if value is None:
            return False
        return value >= self.value if self.at_least else value <= self.value

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read 'accuracy>=0.97' or 'loss<=0.1'."""
        match = _TARGET.fullmatch(text.strip())
        if match is None:
            raise ValueError("must be like 'accuracy>=0.97'; metrics: accuracy, macro_f1, auc, loss")
        return cls(match[1], match[2] == ">=", float(match[3]))


def _parses_as_target(text: str) -> str:
    Target.parse(text)
    return text


@dataclass(frozen=True, slots=True, config=_STRICT)
class Model:
    """`[model]`: the global model and the pre-processing that stays with it."""

    name: str = ""  # a model of the task; empty: the task's default
    standardise: bool = True  # by mean and deviation computed federated
    filter: FilterName = "none"  # noise filter: images median or gaussian (3x3), tables, signals clip (5 std)
    # An earlier global model: a model file, a run folder, or "release:N" of this server.
    start: str | None = None  # whose weights the run begins with
    distil_from: str | None = None  # that teaches the run's first model, of whatever architecture


@dataclass(frozen=True, slots=True, config=_STRICT)
class Clients:
    """`[clients]`: who takes part (a simulation makes them; a deployment has them)."""

    # A simulation makes so many (None: 10, or as many as the data has natural clients); a deployment begins
    # once so many suitable devices are online (None: one).
    count: Count | None = None
    partition: PartitionName = "iid"
    size_sigma: NotNegative = 0.0  # partition draw: spread of the clients' sizes, sigma of a log-normal
    # Of a deployment alone: which of the devices that are online take part.
    tiers: tuple[TierName, ...] = ()  # those of any of these tiers; empty: of all
    tags: tuple[TagName, ...] = ()  # those that carry all of these tags
    max_seconds: Positive | None = None  # not those whose answers have been taking longer

    @property
    def wanted(self) -> int:
        """How many clients an artificial partition makes."""
        return self.count if self.count is not None else 10

    @property
    def needed(self) -> int:
        """How many suitable devices a deployment waits for before it begins."""
        return self.count if self.count is not None else 1


@dataclass(frozen=True, slots=True, config=_STRICT)
class Rounds:
    """`[rounds]`: how long, with how many, and when a round closes."""

    count: Count = 20  # at most this many rounds
    fraction: Fraction = 1.0  # of the clients, drawn anew each round
    cohort: Count | None = None  # so many clients in each round, whatever the population; None: the fraction
    # fixed: as many each time, without replacement; poisson: each client by itself, with this probability;
    # size: so many draws by the clients' examples, with replacement; round_robin: who was asked longest ago
    sampling: Literal["fixed", "poisson", "size", "round_robin"] = "fixed"
    quorum: Fraction = 1.0  # of a round's clients: so many valid updates close it early
    min_updates: Count = 1  # fewer valid updates than this: the round does not count
    deadline_s: Positive | None = None  # after this it closes with what has come
    fit_work: bool = False  # each client trains on as much as it can by deadline_s, as its answers show
    # fixed: train.epochs passes over a client's data; adaptive: as many as pay, as rounds have shown
    local_work: Literal["fixed", "adaptive"] = "fixed"
    target: Annotated[str, AfterValidator(_parses_as_target)] | None = None  # "accuracy>=0.97"
    # reached once it holds with this certainty, one-sided, over the test data; None: once the figure does
    target_confidence: Confidence | None = None
    patience: Count | None = None  # stop after so many rounds without a gain of min_gain
    min_gain: NotNegative = 0.001  # of the target's metric, or accuracy
    smooth: Count = 1  # patience looks at the mean of so many last rounds

    def __post_init__(self) -> None:
        """Refuse work that is fitted to nothing."""
        if self.fit_work and self.deadline_s is None:
            raise ValueError("fit_work needs deadline_s, by which clients are to answer")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Validate:
    """`[validate]`: what a single update must be, beyond names, shapes, dtypes and finite values."""

    max_examples: Annotated[int, Field(ge=1, le=10**9, strict=True)] = 10**9  # that a client may claim
    max_norm: Positive | None = None  # L2 norm of its change; None: not bounded
    # The same in medians of what was accepted in the last five rounds; the first round has none.
    max_norm_ratio: Annotated[float, Field(gt=1, strict=True)] | None = None

    @property
    def norms(self) -> bool:
        """Whether norms are bounded, and so measured."""
        return self.max_norm is not None or self.max_norm_ratio is not None

    @property
    def of_singles(self) -> bool:
        """Whether any of it needs single updates."""
        return self != Validate()


@dataclass(frozen=True, slots=True, config=_STRICT)
class Train:
    """`[train]`: what a client does with its own data in one round."""

    epochs: Count = 1  # passes over the client's data (fedsgd makes exactly one and takes no other value)
    batch_size: Count = 32
    learning_rate: Positive = 0.05
    optimizer: OptimizerName = "sgd"
    momentum: Share = 0.9  # sgd and rmsprop only
    weight_decay: NotNegative = 0.0
    loss: LossName = "cross_entropy"
    label_smoothing: Share = 0.0  # cross_entropy only
    augment: tuple[Augmentation, ...] = ()  # images: flip, shift:PIXELS; any: noise:STD, mask:SHARE
    # Patterns on the names of parameters, such as "0.*": these stay as they are. Clients are told the names.
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, config=_STRICT)
class StrategyConfig:
    """`[strategy]`: the aggregation rule; every further key of the table is that rule's own."""

    name: str = "fedavg"
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, config=_STRICT)
class Privacy:
    """`[privacy]`: what keeps single clients, or their examples, from showing in what is released."""

    # central: the server clips and adds noise; local: each device does; example: it does so in each step;
    # distributed: each device adds a share of a sum's noise, which secure aggregation adds up
    mechanism: Literal["none", "central", "local", "example", "distributed"] = "none"
    # L2 norm that a client's change (example: an example's gradient) is cut to; adaptive_clip: the first one
    clip_norm: Positive = 1.0
    noise_multiplier: Positive = (
        1.0  # deviation of the noise on the sum (local: on each change), in clip_norm
    )
    # example: devices with fewer take no part; each makes min_examples / batch_size steps in a pass
    min_examples: Count = 1
    adaptive_clip: bool = False  # clip_norm follows a quantile of the changes' norms
    clip_quantile: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.5  # which quantile
    clip_learning_rate: Positive = 0.2  # how fast: of the step of log clip_norm
    clip_count_sigma: Positive | None = None  # noise on the count of unclipped; None: a 20th of the clients
    delta: Annotated[float, Field(gt=0, lt=1, strict=True)] = 1e-5  # at which epsilon is stated
    max_epsilon: Positive | None = None  # a round that would pass it is not begun; None: no limit
    accountant: AccountantName = "pld"
    ledger: LedgerName = "default"  # runs over the same devices share one: their rounds add up
    secure_aggregation: bool = False  # the server sees the sum of a round's changes and no single one
    secure_range: Positive = 4.0  # a change's values are cut to it on the device
    secure_examples: Count = 1000  # a client with more counts as so many
    secure_dropouts: Share = 0.2  # of a round's clients that may be lost; more: nothing is opened
    secure_corrupt: Share = 0.1  # of a round's clients that may work together with the server
    secure_neighbours: WholeOrNone = 0  # with whom each client shares masks; 0: as few as are safe


@dataclass(frozen=True, slots=True, config=_STRICT)
class Communication:
    """`[communication]`: what travels between server and clients, and in what form."""

    # what is done to a client's change, in this order: topk:SHARE or randomk:SHARE, then int8 or sign
    codec: Annotated[tuple[str, ...], AfterValidator(_parses_as_codec)] = ()
    error_feedback: bool = True  # what a codec leaves out is kept on the device and added to its next change

    # the same for the global state's change, for clients that hold the last one; needs `codec`
    downlink: Annotated[tuple[str, ...], AfterValidator(_parses_as_codec)] = ()

    keep_frozen: bool = False  # devices keep what train.freeze leaves as it is, and are sent it once

    def __post_init__(self) -> None:
        """Refuse changes on the way down alone."""
        if self.downlink and not self.codec:
            raise ValueError("downlink needs a codec too: by its use the server knows who holds a state")

    @property
    def uplink(self) -> Codec | None:
        """The codec of updates, if there is one."""
        return Codec.of(self.codec, feedback=self.error_feedback) if self.codec else None

    @property
    def down(self) -> Codec | None:
        """The codec of the global state's change, if there is one."""
        return Codec.of(self.downlink) if self.downlink else None


@dataclass(frozen=True, slots=True, config=_STRICT)
class Simulation:
    """`[simulation]`: how a simulation uses the machine; a deployment has no use for it."""

    # vector: clients batched; sequential: one by one by the device's own code; ray: Flower's simulation
    engine: Literal["vector", "sequential", "ray"] = "vector"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # vector: auto takes a GPU if there is one
    clients_at_once: WholeOrNone = 0  # batched together; 0: measured for the model and the machine
    # processes of "vector", this one included, and actors of "ray"; 0: one for each core, where it pays
    workers: WholeOrNone = 0


@dataclass(frozen=True, slots=True, config=_STRICT)
class Scenario:
    """`[scenario]`: what befalls simulated clients, on the simulated clock; a deployment has no use for it.

    Each `_sigma` is that of a log-normal with median 1 by which clients differ for the whole run.
    """

    seconds_per_example: Positive = 0.001  # to train on one example once
    speed_sigma: NotNegative = 0.0
    stragglers: Share = 0.0  # of all answers: their work takes longer
    straggler_factor: Annotated[float, Field(ge=1, strict=True)] = 10.0  # by so much
    down_bytes_per_s: Positive | None = None  # None: it takes no time
    up_bytes_per_s: Positive | None = None
    bandwidth_sigma: NotNegative = 0.0
    latency_s: NotNegative = 0.0  # of each way
    latency_sigma: NotNegative = 0.0
    pause_s: NotNegative = 0.0  # before each round
    day_s: Positive = 86_400.0
    online_share: Fraction = 1.0  # of each day, in one piece, that a client is online
    online_spread: Annotated[float, Field(ge=0, le=1, strict=True)] = 1.0  # of the day over which these begin
    battery_s: Positive | None = None  # work that a full battery lasts for; None: no battery
    battery_min: Share = 0.2  # charge below which a client does not take part
    recharge_s: Positive = 28_800.0  # from empty to full
    dropouts: Share = 0.0  # of all answers: never come
    silent: Share = 0.0  # of the clients: take what they are sent, and nothing is ever heard of them
    late_share: Share = 0.0  # of the clients: are not there from the beginning
    late_from_s: NotNegative = 0.0  # when the first of these joins
    late_over_s: NotNegative = 0.0  # and until the last has joined, evenly
    attackers: Share = 0.0  # of the clients
    attacks: tuple[Attack, ...] = ("sign_flip",)  # each attacker does one of these
    data: Literal["all", "growing", "moving"] = "all"  # what a client holds of its data at a time
    data_share: Fraction = 0.5  # growing: at the beginning; moving: at any time
    data_over_s: Positive = 86_400.0  # growing: until it holds all; moving: once through all its classes
    record: bool = True  # write events.jsonl in the run folder
    replay: str | None = None  # an events.jsonl that says what befalls clients, instead of drawing it


@dataclass(frozen=True, slots=True, config=_STRICT)
class Evaluate:
    """`[evaluate]`: which data the server keeps, for what, and what it measures on it."""

    metrics: tuple[MetricName, ...] = ("accuracy", "macro_f1", "auc", "recall")
    holdout_fraction: Share = 0.2  # of all data, stratified, where the file has no split of its own
    gate_fraction: Fraction = 0.5  # of the hold-out: for the release gate and nothing else
    proxy_fraction: Share = 0.1  # of the training data: the server's own, to distil and calibrate with
    # also let all clients evaluate the global model: on what they keep back, else on what they train with
    federated: bool = False
    client_holdout: Share = 0.0  # of each client's own examples that it keeps back from training
    # also train so many times without a part of the data and test on it: whole natural clients, else examples
    folds: Annotated[int, Field(ge=2, le=1000, strict=True)] | None = None
    leave_one_client_out: bool = False  # the same without each natural client in turn
    confidence: Confidence = 0.95  # of intervals, two-sided
    resamples: Resamples = 1000  # of the bootstrap
    # also say how much each update stands out; None: where the strategy looks at single updates anyway
    anomalies: bool | None = None


@dataclass(frozen=True, slots=True, config=_STRICT)
class Distil:
    """`[compress.distil]`: how a student learns from the global model."""

    mode: Literal["soft", "hard", "both"] = "both"
    temperature: Positive = 2.0
    hard_weight: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5  # weight of true labels, mode "both"
    epochs: Count = 60
    batch_size: Count = 64
    learning_rate: Positive = 0.01  # Adam, the peak of one cycle
    augment: tuple[Augmentation, ...] = ()
    views: Annotated[int, Field(ge=0, le=64, strict=True)] = (
        8  # altered copies, answered once; 0: anew each batch
    )
    hint_weight: NotNegative = 0.0  # of what the teacher's last hidden layer says (FitNets); 0: not asked
    precision: PrecisionName = "auto"  # bf16: products in bfloat16; auto: where this processor gains by it


@dataclass(frozen=True, slots=True, config=_STRICT)
class Prune:
    """`[compress.prune]`: what is removed from the global model, in how many steps, and how it recovers."""

    # structured: whole channels along the dependency graph; unstructured: single weights, which become 0
    kinds: tuple[PruneKind, ...] = ("structured",)
    criterion: Literal["l1", "l2", "lp", "random"] = "l2"  # of single weights every norm is the magnitude
    p: Positive = 3.0  # exponent of the norm, criterion "lp"
    ratios: tuple[Share, ...] = (0.5, 0.75)  # channels removed, kind "structured"; one candidate each
    sparsities: tuple[Share, ...] = (0.9, 0.95)  # weights set to 0, kind "unstructured"; one candidate each
    schedule: Literal["one_shot", "gradual"] = "one_shot"  # gradual: in steps, with recovery between them
    steps: Annotated[int, Field(ge=2, le=1000, strict=True)] = 5  # of schedule "gradual"
    recovery_epochs: Count = 20  # of distillation from the unpruned model, over all steps
    recovery_learning_rate: Positive = 0.003  # Adam, the peak of one cycle; lower than a student's


@dataclass(frozen=True, slots=True, config=_STRICT)
class Grid:
    """`[compress.grid]`: training of weights that may only have few values; the rest is as in distil."""

    epochs: Count = 30
    learning_rate: Positive = 0.003  # Adam, the peak of one cycle; lower than a student's: it has learned


@dataclass(frozen=True, slots=True, config=_STRICT)
class Gate:
    """`[compress.gate]`: how sure the evidence must be."""

    confidence: Confidence = 0.95  # one-sided, over all attempts of a tier
    resamples: Resamples = 4000


@dataclass(frozen=True, slots=True, config=_STRICT)
class OnClients:
    """`[compress.clients]`: how clients distil, calibrate and gate, where they are the data."""

    rounds: Count = 30  # in which they train a student
    epochs: Count = 4  # passes over a client's own examples in each
    batch_size: Count = 16  # examples of a step: a client has few, and a round moves by its steps
    learning_rate: Positive = 0.003  # Adam's, on each client anew in each round
    selection_share: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.3  # of what a client keeps back
    min_examples: Count = 8  # a client with fewer tells neither ranges nor counts of them
    max_examples: Count = 1000  # of a client that count for a variant: nobody's share of a gate is larger
    trim: Annotated[float, Field(ge=0, lt=0.5, strict=True)] = 0.1  # of the clients' ranges, at either end


@dataclass(frozen=True, slots=True, config=_STRICT)
class Compress:
    """`[compress]`: settings of the search for variants and of the stages that make them."""

    max_seconds: Positive = 300.0  # for building candidates; what would take longer is left out, and said
    forms: tuple[FormName, ...] = ("fp32", "int8", "w8", "w4", "ternary", "binary")  # numbers of weights

    # what students learn from, ranges are taken from, and variants are judged on
    data: Literal["auto"] | DataKind = "auto"
    distil: Distil = Distil()
    prune: Prune = Prune()
    grid: Grid = Grid()
    gate: Gate = Gate()
    clients: OnClients = OnClients()


@dataclass(frozen=True, slots=True, config=_STRICT)
class Tier:
    """`[tiers.NAME]`: the budgets of one class of devices; None: no limit."""

    preset: Literal["board", "gateway", "pc"] | None = None  # gives the keys that are left out, see PRESETS
    aim: Literal["accuracy", "bytes", "latency"] = (
        "accuracy"  # what is best among those that may pass the gate
    )
    max_wire_bytes: Count | None = None  # what crosses the network
    max_memory_bytes: Count | None = None  # installed model plus its largest activations
    max_latency_ms: Positive | None = None  # median at batch 1 on the device: as measured here times slowdown
    threads: Annotated[int, Field(ge=1, le=256, strict=True)] = 1  # that an answer may use
    slowdown: Positive = 1.0  # how many times slower the device's processor is than the one that compresses
    max_drop: Share = 0.01  # accuracy that may be lost, upper confidence bound
    max_class_drop: Share | None = None  # the same for the recall of each class


# Budgets by name. The memory is the model's share, beside the runtime (about 55 MB). How many times slower a
# processor is can only be measured (docs/compression.md says how); these are cautious guesses.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "board": {
        "max_wire_bytes": 1_000_000,
        "max_memory_bytes": 64_000_000,
        "max_latency_ms": 50.0,
        "slowdown": 10.0,
    },
    "gateway": {
        "max_wire_bytes": 8_000_000,
        "max_memory_bytes": 256_000_000,
        "max_latency_ms": 50.0,
        "threads": 2,
        "slowdown": 4.0,
    },
    "pc": {
        "max_wire_bytes": 64_000_000,
        "max_memory_bytes": 1_000_000_000,
        "max_latency_ms": 50.0,
        "threads": 4,
        "slowdown": 1.5,
    },
}


@dataclass(frozen=True, slots=True, config=_STRICT)
class Config:
    """A whole run. Build it with `load`, `from_mapping` or keyword arguments; it is checked either way."""

    task: str = "digits"  # digits, images, tables, signals, characters, or package.module:TASK
    data: str | None = None  # file or folder; digits needs none
    data_label: str = "y"  # tables: the column that holds the label
    data_client: str | None = None  # tables: the column that holds the natural client
    data_size: tuple[Count, Count] | None = None  # image folders: resize to (height, width)
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 0
    model: Model = Model()
    clients: Clients = Clients()
    rounds: Rounds = Rounds()
    validate: Validate = Validate()
    train: Train = Train()
    strategy: StrategyConfig = StrategyConfig()
    privacy: Privacy = Privacy()
    communication: Communication = Communication()
    simulation: Simulation = Simulation()
    scenario: Scenario = Scenario()
    evaluate: Evaluate = Evaluate()
    compress: Compress = Compress()
    tiers: Mapping[TierName, Tier] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Config:
        """Check a nested mapping, as a TOML file gives it.

        Raises:
            ConfigError: an unknown key or an unusable value; the line names it and the nearest valid one.
        """
        nested = dict(values)
        strategy = nested.get("strategy")
        if isinstance(strategy, Mapping):
            options = {key: value for key, value in strategy.items() if key != "name"}
            name = {"name": strategy["name"]} if "name" in strategy else {}
            nested["strategy"] = {**name, "options": options}
        if isinstance(tiers := nested.get("tiers"), Mapping):
            nested["tiers"] = {name: _with_preset(tier) for name, tier in tiers.items()}
        try:
            return _ADAPTER.validate_python(nested)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Config:
        """Read a TOML file and apply `key=value` overrides; paths in it are relative to its folder.

        Raises:
            ConfigError: the file is absent or no TOML, or a key or value is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"configuration {path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"configuration {path}: not valid TOML ({error})") from error
        if isinstance(values.get("data"), str):
            values["data"] = str((path.parent / values["data"]).resolve())
        model = values.get("model")
        for key in ("start", "distil_from"):
            if (
                isinstance(model, dict)
                and isinstance(at := model.get(key), str)
                and not at.startswith("release:")
            ):
                model[key] = str((path.parent / at).resolve())
        scenario = values.get("scenario")
        if isinstance(scenario, dict) and isinstance(scenario.get("replay"), str):
            scenario["replay"] = str((path.parent / scenario["replay"]).resolve())
        try:
            return cls.from_mapping(override(values, overrides))
        except ConfigError as error:
            raise ConfigError(f"configuration {path}: {error}") from error

    def to_mapping(self) -> dict[str, Any]:
        """The nested plain form: `Config.from_mapping(config.to_mapping()) == config`."""
        plain: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude_none=True)
        strategy = plain.pop("strategy")
        return {**plain, "strategy": {"name": strategy["name"], **strategy["options"]}}

    def section_json(self, name: str) -> str:
        """One section as JSON, to travel in a message."""
        section = getattr(self, name)
        return TypeAdapter(type(section)).dump_json(section).decode()


_ADAPTER = TypeAdapter(Config)


def parse_train(text: str) -> Train:
    """Read a `[train]` section that came in a message.

    Raises:
        ConfigError: it is malformed or out of range.
    """
    try:
        return TypeAdapter(Train).validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"train settings in the message: {_one_line(error)}") from error


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments; a value is read as TOML, else taken as a string.

    Raises:
        ConfigError: an assignment has no '=' or goes through a key that is not a table.
    """
    result = _copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: write it as key=value, such as --set rounds.count=5")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = result
        *path, last = key.strip().split(".")
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment!r}: {part!r} is a value, not a table")
        table[last] = value
    return result


def _with_preset(tier: Any) -> Any:
    """The tier's table with the keys that its preset gives and it does not."""
    preset = tier.get("preset") if isinstance(tier, Mapping) else None
    return {**PRESETS[preset], **tier} if isinstance(preset, str) and preset in PRESETS else tier


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def suggestion(name: str, valid: Sequence[str]) -> str:
    """'did you mean ...?' for a misspelt name, or the list of the valid ones."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, in one line, with a count of the others."""
    lines = list(dict.fromkeys(_describe(detail) for detail in error.errors()))
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _describe(detail: ErrorDetails) -> str:
    kind, value = detail["type"], detail["input"]
    path = [str(part) for part in detail["loc"] if part != "[key]"]
    if path[:2] == ["strategy", "options"]:  # nested here, but not in the file
        key = _printable(".".join(["strategy", *path[2:3]]))
        return f"{key} = {value!r}: must be a number, a text, true or false"
    if kind == "missing":  # of a pair: the input is the whole of it
        path = path[:-1]
    key = _printable(".".join(path)) or "configuration"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key '{key}': {suggestion(path[-1], _keys_at(path[:-1]))}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{key} = {value!r}: {suggestion(str(value), choices)}"
    message = _PLAINLY.get(kind) or detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key} = {value!r}: {message}"


def _printable(key: str) -> str:
    """A key may hold line breaks; a message is one line."""
    return key if key.isprintable() else repr(key)[1:-1]


_PLAINLY = {  # what pydantic says in terms of Python
    "dataclass_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
    "missing": "must be a list of two",
    "too_long": "must be a list of two",
    "invalid_key": "a key must be text",
    "string_pattern_mismatch": "must be lower-case letters, digits, '-' and '_', and start with a letter",
}


def _keys_at(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        section = Tier if section == "tiers" else _type_of(section, part)
    return ["NAME"] if section == "tiers" else list(section.__dataclass_fields__)


def _type_of(section: Any, name: str) -> Any:
    if name == "tiers":
        return "tiers"
    return type(section.__dataclass_fields__[name].default)
