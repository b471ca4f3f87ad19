"""The tables of a run: who takes part, how they learn, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from fedge.codecs.chain import Codec
from fedge.config.values import (
    STRICT,
    AccountantName,
    Attack,
    Augmentation,
    Confidence,
    Count,
    FilterName,
    Fraction,
    LedgerName,
    LossName,
    MetricName,
    NotNegative,
    OptimizerName,
    PartitionName,
    Positive,
    Resamples,
    Share,
    TagName,
    TierName,
    WholeOrNone,
    parses_as_codec,
    parses_as_target,
)


@dataclass(frozen=True, slots=True, config=STRICT)
class Model:
    """`[model]`: the global model and the pre-processing that stays with it."""

    name: str = ""  # a model of the task; empty: the task's default
    standardise: bool = True  # by mean and deviation computed federated
    filter: FilterName = "none"  # noise filter: images median or gaussian (3x3), tables, signals clip (5 std)
    # An earlier global model: a model file, a run folder, or "release:N" of this server.
    start: str | None = None  # whose weights the run begins with
    distil_from: str | None = None  # that teaches the run's first model, of whatever architecture
    # Share of each client's loss that holds to the answers of `start` on its examples; the rest is labels'
    remember: Share = 0.0
    remember_temperature: Positive = 2.0  # by which both networks' logits are divided

    def __post_init__(self) -> None:
        """Refuse to remember nothing."""
        if self.remember and self.start is None:
            raise ValueError("remember needs start, the earlier model whose answers are held to")


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
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
    target: Annotated[str, AfterValidator(parses_as_target)] | None = None  # "accuracy>=0.97"
    # reached once it holds with this certainty, one-sided, over the test data; None: once the figure does
    target_confidence: Confidence | None = None
    patience: Count | None = None  # stop after so many rounds without a gain of min_gain
    min_gain: NotNegative = 0.001  # of the target's metric, or accuracy
    smooth: Count = 1  # patience looks at the mean of so many last rounds

    def __post_init__(self) -> None:
        """Refuse work that is fitted to nothing."""
        if self.fit_work and self.deadline_s is None:
            raise ValueError("fit_work needs deadline_s, by which clients are to answer")


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
class Train:
    """`[train]`: what a client does with its own data in one round."""

    epochs: Count = 1  # passes over the client's data (fedsgd makes exactly one and takes no other value)
    batch_size: Count = 32
    learning_rate: Positive = 0.05
    # constant; or cosine: it falls over rounds.count along half a wave, nearly to 0 in the last round
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: OptimizerName = "sgd"
    momentum: Share = 0.9  # sgd and rmsprop only
    weight_decay: NotNegative = 0.0
    loss: LossName = "cross_entropy"
    label_smoothing: Share = 0.0  # cross_entropy only
    augment: tuple[Augmentation, ...] = ()  # images: flip, shift:PIXELS; any: noise:STD, mask:SHARE
    # Patterns on the names of parameters, such as "0.*": these stay as they are. Clients are told the names.
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, config=STRICT)
class StrategyConfig:
    """`[strategy]`: the aggregation rule; every further key of the table is that rule's own."""

    name: str = "fedavg"
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
class Communication:
    """`[communication]`: what travels between server and clients, and in what form."""

    # what is done to a client's change, in this order: topk:SHARE or randomk:SHARE, then int8 or sign
    codec: Annotated[tuple[str, ...], AfterValidator(parses_as_codec)] = ()
    error_feedback: bool = True  # what a codec leaves out is kept on the device and added to its next change

    # the same for the global state's change, for clients that hold the last one; needs `codec`
    downlink: Annotated[tuple[str, ...], AfterValidator(parses_as_codec)] = ()

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


@dataclass(frozen=True, slots=True, config=STRICT)
class Simulation:
    """`[simulation]`: how a simulation uses the machine; a deployment has no use for it."""

    # vector: clients batched; sequential: one by one by the device's own code; ray: Flower's simulation
    engine: Literal["vector", "sequential", "ray"] = "vector"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # vector: auto takes a GPU if there is one
    clients_at_once: WholeOrNone = 0  # batched together; 0: measured for the model and the machine
    # processes of "vector", this one included, and actors of "ray"; 0: one for each core, where it pays
    workers: WholeOrNone = 0


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
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
