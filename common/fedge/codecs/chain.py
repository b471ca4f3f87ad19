"""A codec as configurations and messages name it: which values are kept, then how a value is written.

`topk:SHARE` and `randomk:SHARE` keep a share of the values (Stich et al. 2018, *Sparsified SGD with
Memory*); `int8` writes each in a byte, `sign` in a bit (Karimireddy et al. 2019, *Error Feedback Fixes
SignSGD*). One of each kind at most, in this order: `topk:0.01` and then `sign` is sparse ternary compression
(Sattler et al. 2019).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Kept = Literal["all", "topk", "randomk"]
Values = Literal["float32", "int8", "sign"]

LEAST_SHARE: Final = 1e-6
_SPARSE: Final = re.compile(r"(topk|randomk):(\d{0,2}\.?\d{1,9})")
_FORMS: Final = "'topk:SHARE', 'randomk:SHARE', 'int8', 'sign'"
MAX_TEXT: Final = 64  # characters of a codec's text


@dataclass(frozen=True, slots=True)
class Codec:
    """What is done to a change before it travels."""

    kept: Kept = "all"  # which values: those of the largest magnitude, some drawn at random, or all
    share: float = 1.0  # of the values, at most 1
    values: Values = "float32"  # how a value is written
    feedback: bool = True  # what is not sent is kept, and added to the next change

    def __post_init__(self) -> None:
        if not LEAST_SHARE <= self.share <= 1:
            raise ValueError(f"a share of {self.share:g} must be from {LEAST_SHARE:g} to 1")
        if (self.kept, self.values) == ("all", "float32"):
            raise ValueError(f"does nothing; name one of {_FORMS}")

    @classmethod
    def of(cls, stages: Sequence[str], *, feedback: bool = True) -> Codec:
        """Read stages such as `("topk:0.01", "int8")`.

        Raises:
            ValueError: a stage is unknown, given twice or in the wrong order, or a share is out of range.
        """
        rest = list(stages)
        kept: Kept = "all"
        share = 1.0
        values: Values = "float32"
        if rest and (match := _SPARSE.fullmatch(rest[0])) is not None:
            kept = "topk" if match[1] == "topk" else "randomk"
            share = float(match[2])
            rest = rest[1:]
        if rest and (rest[0] == "int8" or rest[0] == "sign"):
            values = "int8" if rest[0] == "int8" else "sign"
            rest = rest[1:]
        if rest:
            raise ValueError(
                f"{rest[0]!r} cannot stand there: one of 'topk:SHARE' and 'randomk:SHARE' first, then one of "
                "'int8' and 'sign'; either may be left out"
            )
        return cls(kept, share, values, feedback)

    @classmethod
    def parse(cls, text: str, *, feedback: bool = True) -> Codec:
        """Read `text` again; errors as in `of`."""
        if len(text) > MAX_TEXT:
            raise ValueError(f"a codec of {len(text)} characters is over {MAX_TEXT}")
        return cls.of(text.split("+"), feedback=feedback)

    @property
    def text(self) -> str:
        """The stages in one word, such as `topk:0.01+int8`."""
        sparse = "" if self.kept == "all" else f"{self.kept}:{self.share:.9f}".rstrip("0").rstrip(".")
        written = "" if self.values == "float32" else self.values
        return "+".join(filter(None, (sparse, written)))

    @property
    def remembers(self) -> bool:
        """Whether something stays behind on the device; bytes alone are unbiased and near enough without."""
        return self.feedback and (self.kept != "all" or self.values == "sign")

    def count(self, size: int) -> int:
        """How many of so many values travel."""
        return min(size, max(1, round(self.share * size))) if size else 0
