"""The plan of a rollout: which devices when, how long each stage holds, and what stops it. Values only."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.errors import UserError
from fedge.files import read_bounded
from fedge_server.rollout.evidence import KINDS, LIMITED, Criterion

MAX_STAGES: Final = 32
MAX_NAMED: Final = 10_000  # devices or tags that a stage names
MAX_PLAN_BYTES: Final = 1024**2
_NAME_LENGTH: Final = 64
_MAX_NUMBER: Final = 1e12  # of any key
_STAGE_KEYS: Final = {"name", "devices", "tags", "percent", "hold_h", "min_installs"}
_CRITERION_KEYS: Final = {"tolerated", "unacceptable", "at_least", *LIMITED.values()}


@dataclass(frozen=True, slots=True)
class Stage:
    """Devices that may have the release from here on: any that is named, tagged, or within the percentage."""

    name: str
    percent: float = 0.0  # of the tier's devices, 0 to 100
    devices: frozenset[str] = frozenset()  # ids
    tags: frozenset[str] = frozenset()  # a device with any of these
    hold_s: float = 3600.0  # that it waits after the last install that it needs
    min_installs: int = 1  # devices, of this stage and those before, that must have it

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        where = f"stage {self.name!r}"
        if not 0 < len(self.name) <= _NAME_LENGTH or not self.name.isprintable():
            raise UserError(f"{where}: a name has 1 to {_NAME_LENGTH} letters")
        if not 0 <= self.percent <= 100:
            raise UserError(f"{where}: percent = {self.percent:g}: must be 0 to 100")
        if not (self.percent or self.devices or self.tags):
            raise UserError(f"{where}: holds no device; give percent, devices or tags")
        if max(len(self.devices), len(self.tags)) > MAX_NAMED:
            raise UserError(f"{where}: names more than {MAX_NAMED} devices or tags; give tags or percent")
        if not 0 <= self.hold_s < math.inf:
            raise UserError(f"{where}: hold_h = {self.hold_s / 3600:g}: must be 0 or more")
        if self.min_installs < 1:
            raise UserError(f"{where}: min_installs = {self.min_installs}: must be 1 or more")


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in their order, and the criteria that hold in all of them."""

    stages: tuple[Stage, ...]
    criteria: tuple[Criterion, ...]
    false_halts: float = 0.01  # chance that a release which is as bad as tolerated, in everything, is halted
    rollback: bool = True  # a halt orders the way back
    only_tags: frozenset[str] = frozenset()  # devices that lack one of these have no part in it

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 1 <= len(self.stages) <= MAX_STAGES:
            raise UserError(f"plan: {len(self.stages)} stages; must be 1 to {MAX_STAGES}")
        shares = [stage.percent for stage in self.stages]
        if shares != sorted(shares) or shares[-1] != 100:
            shown = ", ".join(f"{share:g}" for share in shares)
            raise UserError(f"plan: percentages {shown}: must not fall, and the last one must be 100")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise UserError(f"plan: two stages have one name: {', '.join(names)}")
        if not self.criteria:
            raise UserError("plan: without a criterion nothing would stop a bad release; give one")
        kinds = [criterion.kind for criterion in self.criteria]
        if len(set(kinds)) < len(kinds):
            raise UserError(f"plan: a criterion is given twice: {', '.join(kinds)}")
        if not 0 < self.false_halts <= 0.5:
            raise UserError(f"plan: false_halts = {self.false_halts:g}: must be above 0 and at most 0.5")

    @property
    def false_halts_each(self) -> float:
        """Of one criterion: together they reach `false_halts` at most (Boole's inequality)."""
        return self.false_halts / len(self.criteria)

    def criterion(self, kind: str) -> Criterion | None:
        """The criterion of this kind."""
        return next((each for each in self.criteria if each.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        """What `from_mapping` reads."""
        return {
            "false_halts": self.false_halts,
            "rollback": self.rollback,
            "tags": sorted(self.only_tags),
            "stages": [_stage_to_json(stage) for stage in self.stages],
            "criteria": {criterion.kind: _criterion_to_json(criterion) for criterion in self.criteria},
        }

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> Plan:
        """A plan as its file or the database holds it.

        Raises:
            UserError: a key is unknown, of another type, or out of range.
        """
        _known("plan", value, {"false_halts", "rollback", "tags", "stages", "criteria"})
        stages, criteria = value.get("stages", []), value.get("criteria", {})
        if not isinstance(stages, list) or not isinstance(criteria, Mapping):
            raise UserError("plan: stages must be [[stages]] tables, and criteria [criteria.NAME] tables")
        return cls(
            stages=tuple(_stage(each) for each in stages),
            criteria=tuple(_criterion(kind, criteria[kind]) for kind in sorted(criteria, key=_order)),
            false_halts=_number("plan", value, "false_halts", 0.01),
            rollback=_boolean("plan", value, "rollback", True),
            only_tags=_texts("plan", value, "tags"),
        )

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan's TOML file.

        Raises:
            UserError: it is absent, no TOML, or no plan.
        """
        if not path.is_file():
            raise UserError(f"plan {path}: there is no such file")
        try:
            return cls.from_mapping(tomllib.loads(read_bounded(path, MAX_PLAN_BYTES).decode()))
        except (ValueError, UserError) as error:
            raise UserError(f"plan {path}: {error}") from error


def default_criteria(max_latency_ms: float | None = None) -> tuple[Criterion, ...]:
    """What is watched unless a plan says otherwise; latency where the tier has a budget."""
    found = [
        Criterion("install", 0.02, 0.10, at_least=3),
        Criterion("health", 0.02, 0.10, at_least=3),
        Criterion("confidence", 0.10, 0.40, at_least=3, limit=0.1),
    ]
    if max_latency_ms is not None:
        found.append(Criterion("latency", 0.05, 0.25, at_least=3, limit=max_latency_ms))
    return tuple(found)


def default_stages() -> tuple[Stage, ...]:
    """A twentieth, a quarter, all; a first stage of the user's own may come before."""
    return (
        Stage("canary", 5.0, hold_s=3600.0),
        Stage("quarter", 25.0, hold_s=3600.0),
        Stage("all", 100.0, hold_s=3600.0),
    )


def _stage(value: Any) -> Stage:
    where = f"stage {value.get('name', '')!r}" if isinstance(value, Mapping) else "stage"
    _known(where, value, _STAGE_KEYS)
    name = value.get("name", "")
    if not isinstance(name, str):
        raise UserError(f"stage: name = {name!r}: must be text")
    return Stage(
        name=name,
        percent=_number(where, value, "percent", 0.0),
        devices=_texts(where, value, "devices"),
        tags=_texts(where, value, "tags"),
        hold_s=3600 * _number(where, value, "hold_h", 1.0),
        min_installs=_integer(where, value, "min_installs", 1),
    )


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _criterion(kind: str, value: Any) -> Criterion:
    where = f"criterion {kind}"
    _known(where, value, _CRITERION_KEYS)
    limits = [name for name in LIMITED.values() if name in value]
    if limits and limits != [LIMITED.get(kind)]:
        raise UserError(f"{where}: {limits[0]} is not its key")
    for key in ("tolerated", "unacceptable"):
        if key not in value:
            raise UserError(f"{where}: needs {key}")
    return Criterion(
        kind=kind,
        tolerated=_number(where, value, "tolerated", 0.0),
        unacceptable=_number(where, value, "unacceptable", 0.0),
        at_least=_integer(where, value, "at_least", 1),
        limit=_number(where, value, limits[0], 0.0) if limits else None,
    )


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "percent": stage.percent,
        "devices": sorted(stage.devices),
        "tags": sorted(stage.tags),
        "hold_h": stage.hold_s / 3600,
        "min_installs": stage.min_installs,
    }


def _criterion_to_json(criterion: Criterion) -> dict[str, Any]:
    value: dict[str, Any] = {
        "tolerated": criterion.tolerated,
        "unacceptable": criterion.unacceptable,
        "at_least": criterion.at_least,
    }
    if criterion.limit is not None:
        value[LIMITED[criterion.kind]] = criterion.limit
    return value


def _known(where: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be a table")
    if unknown := sorted(set(value) - keys):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; keys: {', '.join(sorted(keys))}")


def _number(where: str, value: Mapping[str, Any], key: str, default: float) -> float:
    found = value.get(key, default)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not abs(found) <= _MAX_NUMBER:
        raise UserError(f"{where}: {key} = {str(found)[:60]}: must be a number")
    return float(found)


def _integer(where: str, value: Mapping[str, Any], key: str, default: int) -> int:
    found = value.get(key, default)
    if isinstance(found, bool) or not isinstance(found, int) or abs(found) > _MAX_NUMBER:
        raise UserError(f"{where}: {key} = {str(found)[:60]}: must be a whole number")
    return found


def _boolean(where: str, value: Mapping[str, Any], key: str, default: bool) -> bool:
    found = value.get(key, default)
    if not isinstance(found, bool):
        raise UserError(f"{where}: {key} = {found!r}: must be true or false")
    return found


def _texts(where: str, value: Mapping[str, Any], key: str) -> frozenset[str]:
    found = value.get(key, [])
    is_texts = isinstance(found, Sequence) and not isinstance(found, str)
    if not is_texts or not all(isinstance(text, str) and text for text in found):
        raise UserError(f"{where}: {key} = {found!r}: must be a list of texts")
    return frozenset(found)
