"""The tables of compression: how variants are made, and what a tier's devices can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedge.config.values import (
    STRICT,
    Augmentation,
    Confidence,
    Count,
    DataKind,
    FormName,
    NotNegative,
    Positive,
    PrecisionName,
    PruneKind,
    Resamples,
    Share,
)


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
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


@dataclass(frozen=True, slots=True, config=STRICT)
class Grid:
    """`[compress.grid]`: training of weights that may only have few values; the rest is as in distil."""

    epochs: Count = 30
    learning_rate: Positive = 0.003  # Adam, the peak of one cycle; lower than a student's: it has learned


@dataclass(frozen=True, slots=True, config=STRICT)
class Gate:
    """`[compress.gate]`: how sure the evidence must be."""

    confidence: Confidence = 0.95  # one-sided, over all attempts of a tier
    resamples: Resamples = 4000


@dataclass(frozen=True, slots=True, config=STRICT)
class Calibration:
    """`[compress.routing]`: when a device that may ask the cloud should, as a release says it."""

    doubt: Literal["confidence", "margin", "entropy"] = "confidence"  # measure of an answer's doubt
    gap: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.005  # of requests answered worse than the cloud
    confidence: Confidence = 0.95  # of each promise, over all recipes


@dataclass(frozen=True, slots=True, config=STRICT)
class OnClients:
    """`[compress.clients]`: how clients distil, calibrate and gate, where they are the data."""

    rounds: Count = 30  # in which they train a student
    epochs: Count = 4  # passes over a client's own examples in each
    batch_size: Count = 32  # examples of a step: a client has few, and a round moves by its steps
    learning_rate: Positive = 0.007  # Adam's, on each client anew in each round
    server_momentum: Share = 0.5  # of the step that the server makes of a round's mean change
    selection_share: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.3  # of what a client keeps back
    min_examples: Count = 8  # a client with fewer tells neither ranges nor counts of them
    max_examples: Count = 1000  # of a client that count for a variant: nobody's share of a gate is larger
    trim: Annotated[float, Field(ge=0, lt=0.5, strict=True)] = 0.1  # of the clients' ranges, at either end


@dataclass(frozen=True, slots=True, config=STRICT)
class Compress:
    """`[compress]`: settings of the search for variants and of the stages that make them."""

    max_seconds: Positive = 300.0  # for building candidates; what would take longer is left out, and said
    forms: tuple[FormName, ...] = ("fp32", "int8", "w8", "w4", "ternary", "binary")  # numbers of weights
    students: tuple[str, ...] = (
        "*",
    )  # names of those that are tried, or patterns such as "cnn3-*"; none: ()

    # what students learn from, ranges are taken from, and variants are judged on
    data: Literal["auto"] | DataKind = "auto"
    distil: Distil = Distil()
    prune: Prune = Prune()
    grid: Grid = Grid()
    gate: Gate = Gate()
    routing: Calibration = Calibration()
    clients: OnClients = OnClients()


@dataclass(frozen=True, slots=True, config=STRICT)
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
