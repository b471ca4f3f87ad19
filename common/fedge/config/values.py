"""What a value of the configuration may be: ranges, names and small languages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from fedge.codecs.chain import Codec

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

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


def matching(pattern: re.Pattern[str], forms: str) -> AfterValidator:
    """Refuse a text of another form; `forms` lists the valid ones."""

    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"must be one of {forms}")
        return value

    return AfterValidator(check)


def parses_as_codec(stages: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse stages that make no codec."""
    if stages:
        Codec.of(stages)
    return stages


Augmentation = Annotated[str, matching(_AUGMENT, "'flip', 'shift:PIXELS', 'noise:STD', 'mask:SHARE'")]
PartitionName = Annotated[
    str,
    matching(_PARTITION, "'iid', 'natural', 'dirichlet:ALPHA', 'shards:PER_CLIENT', 'draw:SIZE[:ALPHA]'"),
]
Attack = Annotated[
    str,
    matching(
        ATTACK,
        "'sign_flip', 'scale:FACTOR', 'noise:STD', 'nan', 'label_flip', 'free_rider', 'ipm:EPSILON', 'alie', "
        "'alie:Z', 'mimic', 'backdoor:CLASS'",
    ),
]


@dataclass(frozen=True, slots=True, config=STRICT)
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


def parses_as_target(text: str) -> str:
    """Refuse what is no target."""
    Target.parse(text)
    return text
