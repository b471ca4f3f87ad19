"""How a repository of releases names things, and what it says about them: shared by publisher and device.

Each tier has a role of its own, `tier-NAME`, for the targets `NAME/*`:

    NAME/tier.json          what holds for the tier now: its floor, and the newest version (`TierMark`)
    NAME/VERSION.manifest   canonical bytes of the release's manifest
    NAME/VERSION.model      the variant as it travels
    NAME/VERSION.report     the gate's whole report
    NAME/VERSION.golden     synthetic inputs and the variant's answers to them, see `fedge.golden`
    NAME/VERSION.reference  what its inputs and answers looked like, see `fedge.telemetry`; where there is one

The entry of each target carries a `custom` value, signed with the tier's metadata, so that it can be read
without fetching the target: a `TierMark` for `tier.json`, a `ReleaseNote` for the others. Values only; no
files, no TUF library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

from fedge.canonical import canonical
from fedge.errors import FormatError
from fedge.files import sha256
from fedge.manifest import MAX_VERSION, TIER_NAME, Lineage

Kind = Literal["manifest", "model", "report", "golden", "reference"]
KINDS: Final[tuple[Kind, ...]] = ("manifest", "model", "report", "golden")  # that each release has
OPTIONAL: Final[tuple[Kind, ...]] = ("reference",)

SCHEMA: Final = 1
MARK: Final = "tier.json"
KEYS: Final = "keys"  # beside metadata/ and targets/: wrapped content keys, which nobody signs
MAX_MARK_BYTES: Final = 512
# Of metadata files. A publisher writes no longer ones, and a device reads no longer ones.
MAX_ROOT_BYTES: Final = 64 * 1024
MAX_TIMESTAMP_BYTES: Final = 16 * 1024
MAX_SNAPSHOT_BYTES: Final = 256 * 1024
MAX_TARGETS_BYTES: Final = 512 * 1024

_ROLE = "tier-"
_DIGITS = frozenset("0123456789abcdef")


def check_tier(tier: object) -> str:
    """The name of a tier, if it may be one: a role, a folder and a pattern of paths are made of it.

    Raises:
        FormatError: it may not.
    """
    if not isinstance(tier, str) or not TIER_NAME.fullmatch(tier):
        raise FormatError(
            f"tier {repr(tier)[:60]}: must be 1 to 32 lower-case letters, digits, '-' and '_', "
            "and begin with a letter"
        )
    return tier


def role_of(tier: str) -> str:
    """The role that signs for a tier.

    Raises:
        FormatError: no name of a tier.
    """
    return _ROLE + check_tier(tier)


def tier_of(role: str) -> str | None:
    """The tier of a role; None: it is none of a tier."""
    tier = role.removeprefix(_ROLE)
    return tier if tier != role and TIER_NAME.fullmatch(tier) else None


def mark_path(tier: str) -> str:
    """The target that states the floor and the newest version."""
    return f"{check_tier(tier)}/{MARK}"


def target_path(tier: str, version: int, kind: Kind) -> str:
    """The target of one file of a release."""
    _check_version("version", version, 1)
    return f"{check_tier(tier)}/{version}.{kind}"


def delta_path(tier: str, base: int, version: int) -> str:
    """What makes the installed bytes of a version out of those of another: no target, asked for by name."""
    _check_version("base", base, 1)
    _check_version("version", version, 1)
    return f"deltas/{check_tier(tier)}/{base}/{version}"


def key_path(tier: str, version: int, device_id: str) -> str:
    """Where the content key of a sealed version lies, or is asked for, that is wrapped for one device."""
    _check_version("version", version, 1)
    if len(device_id) != 64 or not _DIGITS.issuperset(device_id):
        raise FormatError(f"device {device_id[:60]!r}: must be 64 hexadecimal digits")
    return f"{KEYS}/{check_tier(tier)}/{version}/{device_id}"


def lineage_digest(lineage: Lineage) -> str:
    """SHA-256 of a release's lineage in canonical JSON: the same for all tiers of a release."""
    return sha256(canonical(asdict(lineage), "lineage"))


@dataclass(frozen=True, slots=True)
class TierMark:
    """What holds for a tier now."""

    tier: str
    floor: int  # devices run nothing below it; 0: none yet; it only rises
    newest: int  # the highest version ever published for the tier; 0: none yet

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        check_tier(self.tier)
        _check_version("newest", self.newest, 0)
        _check_version("floor", self.floor, 0)

    def to_json(self) -> dict[str, Any]:
        """The `custom` value, which is the content of the target too."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_bytes(self) -> bytes:
        """The content of the target."""
        return canonical(self.to_json(), "tier")

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a `custom` value.

        Raises:
            FormatError: another schema, or a field that is missing, unknown or out of range.
        """
        return cls(**_fields(cls, value))


@dataclass(frozen=True, slots=True)
class Sealing:
    """How the model of a release is sealed, see `fedge.sealing`."""

    format: int  # >= 1
    key: str  # name of the content key, which tells nothing of it

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        _check_version("sealing.format", self.format, 1)
        _check_digest("sealing.key", self.key)


@dataclass(frozen=True, slots=True)
class ReleaseNote:
    """Which release a target belongs to."""

    version: int
    manifest: str  # SHA-256 of the manifest
    lineage: str  # SHA-256 of the lineage, see `lineage_digest`
    sealing: Sealing | None = None  # None: the model travels as the manifest describes it

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        _check_version("version", self.version, 1)
        _check_digest("manifest", self.manifest)
        _check_digest("lineage", self.lineage)

    def to_json(self) -> dict[str, Any]:
        """The `custom` value; without a field for what is not sealed."""
        value = {"schema": SCHEMA, **asdict(self)}
        if self.sealing is None:
            del value["sealing"]
        return value

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Read a `custom` value.

        Raises:
            FormatError: another schema, or a field that is missing, unknown or out of range.
        """
        found = _fields(cls, value, optional="sealing")
        if (sealing := found.pop("sealing", None)) is not None:
            sealing = Sealing(**_named(Sealing, sealing))
        return cls(**found, sealing=sealing)


def _fields(kind: type[Any], value: object, optional: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or value["schema"] is True:
        raise FormatError(f"target: custom {repr(value)[:80]} is none that this fedge reads; update it")
    return _named(kind, {name: found for name, found in value.items() if name != "schema"}, optional)


def _named(kind: type[Any], value: object, optional: str = "") -> dict[str, Any]:
    """The fields of a mapping, none missing and none unknown."""
    if not isinstance(value, dict):
        raise FormatError(f"target: custom {repr(value)[:80]} must be a mapping")
    names = {item.name for item in fields(kind)}
    if wrong := sorted(names.symmetric_difference(value) - {optional} | (value.keys() - names), key=str):
        what = "is missing" if wrong[0] in names else "is unknown"
        raise FormatError(f"target: custom field {repr(wrong[0])[:60]} {what}")
    return dict(value)


def _check_digest(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) != 64 or not _DIGITS.issuperset(value):
        raise FormatError(f"target: {name} = {repr(value)[:60]}; it must be a SHA-256 in hexadecimal")


def _check_version(name: str, value: object, low: int) -> None:
    if type(value) is not int or not low <= value <= MAX_VERSION:  # a bool is an int, but not here
        raise FormatError(
            f"target: {name} = {repr(value)[:60]}; it must be an integer from {low} to {MAX_VERSION}"
        )
