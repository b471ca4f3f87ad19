"""The manifest of a release: what was made, from which updates, for which tiers. Values only, no files.

The bytes are canonical (sorted keys, no spaces, UTF-8): one release has one spelling and so one digest,
and a document in any other spelling is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Final, TypeVar

from fedge.artefact import MAX_INSTALLED_BYTES
from fedge.canonical import canonical
from fedge.errors import FormatError, TrustError
from fedge.spec import Spec

SCHEMA: Final = 1
MAX_BYTES: Final = 8 * 1024**2  # of one manifest
MAX_EVIDENCE_BYTES: Final = 16 * 1024  # of one variant's figures; the whole report is an object of its own
MAX_VARIANTS: Final = 256
MAX_VERSION: Final = 2**53 - 1  # what every JSON reader holds exactly

_OPTIONAL: Final = frozenset({"reference_sha256"})  # of a variant's fields
_DIGEST = re.compile(r"[0-9a-f]{64}")
TIER_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a release comes from: enough to walk back to the round and its anonymous set of updates."""

    run: str  # id of the run
    round: int  # >= 0; the round after which the global model was taken
    global_model: str  # SHA-256 of the global model's file
    updates: str  # SHA-256 over the anonymous set of updates that the round added up

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        _check_text("lineage.run", self.run)
        _check_integer("lineage.round", self.round, 0, MAX_VERSION)
        _check_digest("lineage.global_model", self.global_model)
        _check_digest("lineage.updates", self.updates)


@dataclass(frozen=True, slots=True)
class VariantEntry:
    """The compact version of the global model for one tier: which bytes, and why they were let out."""

    tier: str
    recipe: str  # the stages that made it, in words
    wire_sha256: str  # of the bytes on the network, which name the object to fetch
    wire_bytes: int
    installed_sha256: str  # of the ONNX file on the device
    installed_bytes: int
    evidence_sha256: str  # of the gate's whole report, an object beside the variants
    golden_sha256: str  # of the golden inputs and its answers to them, another such object
    evidence: Mapping[str, Any] = field(
        default_factory=dict
    )  # the gate's figures: plain JSON, finite numbers
    reference_sha256: str = ""  # of its telemetry reference, another such object; empty: it has none

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not isinstance(self.tier, str) or not TIER_NAME.fullmatch(self.tier):
            raise FormatError(
                f"manifest: tier {_short(self.tier)} must be 1 to 32 lower-case letters, digits, '-' and '_'"
            )
        _check_text("recipe", self.recipe)
        for name in ("wire", "installed", "evidence", "golden"):
            _check_digest(f"{name}_sha256", getattr(self, f"{name}_sha256"))
        if self.reference_sha256 != "":
            _check_digest("reference_sha256", self.reference_sha256)
        _check_integer("wire_bytes", self.wire_bytes, 1, MAX_INSTALLED_BYTES)
        _check_integer("installed_bytes", self.installed_bytes, 1, MAX_INSTALLED_BYTES)
        if not isinstance(self.evidence, dict):
            raise FormatError(
                f"manifest: evidence of tier {self.tier!r} must be a mapping of plain JSON values"
            )
        _check_plain("evidence", self.evidence, depth=8)
        if (length := len(canonical(self.evidence, "manifest"))) > MAX_EVIDENCE_BYTES:
            raise FormatError(
                f"manifest: evidence of tier {self.tier!r} takes {length} bytes, over {MAX_EVIDENCE_BYTES}; "
                "leave the details to the report"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; manifests from before there were references keep their bytes."""
        value = asdict(self)
        if not self.reference_sha256:
            del value["reference_sha256"]
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One global model's variants, ready to be signed."""

    version: int  # >= 1, rises with each release
    task: str
    created: str  # RFC 3339, UTC, whole seconds: 2026-01-31T12:00:00Z
    spec: Spec
    lineage: Lineage
    variants: tuple[VariantEntry, ...]  # at least one, each tier once

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        _check_integer("version", self.version, 1, MAX_VERSION)
        _check_text("task", self.task)
        _check_created(self.created)
        tiers = [entry.tier for entry in self.variants]
        if not 1 <= len(tiers) <= MAX_VARIANTS or len(set(tiers)) != len(tiers):
            raise FormatError(
                f"manifest: {len(tiers)} variants; there must be 1 to {MAX_VARIANTS}, each tier named once"
            )

    def variant(self, tier: str) -> VariantEntry:
        """The entry of one tier.

        Raises:
            TrustError: the release has none for it.
        """
        for entry in self.variants:
            if entry.tier == tier:
                return entry
        offered = ", ".join(entry.tier for entry in self.variants)
        raise TrustError(f"release {self.version} has no variant for tier {tier!r}; it has: {offered}")

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        return {
            "schema": SCHEMA,
            "version": self.version,
            "task": self.task,
            "created": self.created,
            "spec": self.spec.to_json(),
            "lineage": asdict(self.lineage),
            "variants": [entry.to_json() for entry in self.variants],
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes, which are what is signed.

        Raises:
            FormatError: they would be longer than a device reads.
        """
        data = canonical(self.to_json(), "manifest")
        if len(data) > MAX_BYTES:
            raise FormatError(
                f"manifest: takes {len(data)} bytes, over {MAX_BYTES}; shorten labels or evidence"
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Release:
        """Read a manifest from outside; nothing is guessed, defaulted or skipped.

        Raises:
            FormatError: too long, no JSON, another schema, a field that is missing, unknown, of another
                type or out of range, or not the canonical spelling.
        """
        value = _load(data)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA or value["schema"] is True:
            found = _short(value.get("schema")) if isinstance(value, dict) else "none"
            raise FormatError(
                f"manifest: schema {found} is unknown; this fedge reads schema {SCHEMA}: update it"
            )
        names = {"schema", *(item.name for item in fields(cls))}
        _check_names("manifest", value, names)
        if not isinstance(value["variants"], list):
            raise FormatError("manifest: variants must be a list")
        made = cls(
            version=value["version"],
            task=value["task"],
            created=value["created"],
            spec=Spec.from_json(value["spec"]),
            lineage=_build(Lineage, "lineage", value["lineage"]),
            variants=tuple(
                _build(VariantEntry, f"variants[{i}]", entry) for i, entry in enumerate(value["variants"])
            ),
        )
        if made.to_bytes() != data:
            raise FormatError(
                "manifest: not in canonical form (spelling, order of keys, or a key given twice)"
            )
        return made


_Part = TypeVar("_Part", Lineage, VariantEntry)


def _load(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise FormatError(f"manifest: {len(data)} bytes, over the {MAX_BYTES} it may have")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"manifest: not JSON ({str(error)[:120]})") from error


def _build(kind: type[_Part], where: str, value: Any) -> _Part:
    names = {item.name for item in fields(kind)}
    _check_names(where, value, names - ({*_OPTIONAL} - {*value} if isinstance(value, dict) else set()))
    try:
        return kind(**value)
    except FormatError as error:
        raise FormatError(f"{error} (in {where})") from error


def _check_names(where: str, value: Any, names: set[str]) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"manifest: {where} must be an object, not {_short(value)}")
    if wrong := sorted(names.symmetric_difference(value)):
        what = "is missing" if wrong[0] in names else "is unknown"
        raise FormatError(f"manifest: {where}: field {_short(wrong[0])} {what}")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # a bool is an int, but not here
        raise FormatError(f"manifest: {name} = {_short(value)}; it must be an integer from {low} to {high}")


def _check_digest(name: str, value: Any) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise FormatError(f"manifest: {name} = {_short(value)}; it must be 64 lower-case hexadecimal digits")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 1000 or not value.isprintable():
        raise FormatError(f"manifest: {name} = {_short(value)}; it must be 1 to 1000 printable characters")


def _check_created(value: Any) -> None:
    try:
        if not _CREATED.fullmatch(value):
            raise ValueError("another form")
        datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise FormatError(f"manifest: created = {_short(value)}; write it as 2026-01-31T12:00:00Z") from error


def _check_plain(where: str, value: Any, depth: int) -> None:
    """Only what survives JSON unchanged, so that a release read back equals the one written."""
    if depth == 0:
        raise FormatError(f"manifest: {where[:80]} is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise FormatError(f"manifest: {where[:80]} has the key {_short(key)}; keys must be strings")
            _check_plain(f"{where}.{key}", item, depth - 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(f"{where}[{i}]", item, depth - 1)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise FormatError(f"manifest: {where[:80]} is a {type(value).__name__}; use plain JSON values")
    elif isinstance(value, float) and not math.isfinite(value):
        raise FormatError(f"manifest: {where[:80]} is {value}; use finite numbers, or null")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
