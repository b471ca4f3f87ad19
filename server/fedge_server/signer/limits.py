"""A signer's own limits, from a file that the publisher cannot write: they may only narrow the common rules.

tasks = ["digits"]        # what may be released; without it anything
runs = ["night-*"]        # names of runs, with * and ?, that a release may come from
max_drop = 0.02           # a gate that allowed more is not enough; fraction of 1
min_examples = 200        # that the gate has seen
max_days = 90             # of the signature's life
tiers.micro.max_drop = 0.05    # for one tier; so with max_drop and min_examples
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedge.delivery import tier_of
from fedge.errors import ConfigError, FedgeError
from fedge.manifest import Release
from fedge_server.repository import Request

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_SLACK = timedelta(minutes=10)  # between the clocks of publisher and signer

Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True, slots=True, config=_STRICT)
class TierLimits:
    """Of one tier."""

    max_drop: Fraction | None = None
    min_examples: Count | None = None


@dataclass(frozen=True, slots=True, config=_STRICT)
class Limits:
    """The whole file."""

    tasks: tuple[str, ...] = ()  # none: any
    runs: tuple[str, ...] = ("*",)
    max_drop: Fraction = 1.0
    min_examples: Count = 0
    max_days: Annotated[float, Field(gt=0, le=3650, strict=True)] = 90
    tiers: Mapping[str, TierLimits] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Limits:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, or a key or value is wrong.
        """
        try:
            return _ADAPTER.validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"limits {path}: cannot be read ({error})") from error
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(map(str, detail["loc"]))
            raise ConfigError(f"limits {path}: {key}: {detail['msg']}") from error

    def reasons_against(self, request: Request, now: datetime) -> tuple[str, ...]:
        """Why this signer must not sign what the common rules allow; closed when in doubt."""
        try:
            tier = tier_of(request.role) or ""
            return (*self._of_life(request.payload, now), *self._of_releases(tier, request))
        except FedgeError as error:
            return (str(error),)
        except Exception as error:  # noqa: BLE001 - closed: a limit that could not be applied has not been kept
            return (f"the limits could not be applied ({type(error).__name__}: {str(error)[:120]})",)

    def _of_life(self, payload: bytes, now: datetime) -> Iterator[str]:
        expires = datetime.fromisoformat(json.loads(payload)["expires"]).astimezone(UTC)
        if expires > now + timedelta(days=self.max_days) + _SLACK:
            until = f"{expires:%Y-%m-%d}"
            yield f"it would be good until {until}, and this signer signs for {self.max_days:g} days"

    def _of_releases(self, tier: str, request: Request) -> Iterator[str]:
        """The limits hold for what is new: what was signed before was judged by the limits of its day."""
        known = set() if request.previous is None else set(json.loads(request.previous)["targets"])
        own = self.tiers.get(tier, TierLimits())
        most = self.max_drop if own.max_drop is None else own.max_drop
        least = self.min_examples if own.min_examples is None else own.min_examples
        for version, evidence in request.evidence.items():
            if f"{tier}/{version}.manifest" in known:
                continue
            release, report = Release.from_bytes(evidence.manifest), json.loads(evidence.report)
            yield from (f"version {version}: {why}" for why in self._of_origin(release))
            if not _number(report.get("max_drop")) <= most:
                yield f"version {version}: its gate allowed a drop of {report.get('max_drop')!r}, over {most}"
            if least and not _number(report.get("n")) >= least:
                yield f"version {version}: its gate saw {report.get('n')!r} examples, fewer than {least}"

    def _of_origin(self, release: Release) -> Iterator[str]:
        if self.tasks and release.task not in self.tasks:
            yield f"task {release.task[:60]!r} is none of {', '.join(self.tasks)}"
        if not any(fnmatchcase(release.lineage.run, pattern) for pattern in self.runs):
            yield f"run {release.lineage.run[:60]!r} is none of {', '.join(self.runs)}"


_ADAPTER = TypeAdapter(Limits)


def _number(value: Any) -> float:
    """A figure of a report; what is none compares as false."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
