"""`server.toml`: where the hub listens, under which names, and its limits; checked in full at load."""

from __future__ import annotations

import ipaddress
import tomllib
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedge.config import suggestion
from fedge.errors import ConfigError
from fedge_server.drift.watch import Settings as DriftSettings
from fedge_server.inference.limits import Limits as InferenceLimits
from fedge_server.retention.rule import Keep
from fedge_server.telemetry.store import Settings as TelemetrySettings

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Port = Annotated[int, Field(ge=0, le=65535, strict=True)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400, strict=True)]
Days = Annotated[float, Field(ge=1 / 24, le=3650, strict=True)]
Count = Annotated[int, Field(ge=1, le=1_000_000, strict=True)]
OnlineDays = Annotated[float, Field(ge=1 / 24, le=30, strict=True)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,253}$")]


@dataclass(frozen=True, slots=True, config=_STRICT)
class Listen:
    """`[listen]`: where the hub listens for devices."""

    host: Name = "0.0.0.0"  # noqa: S104 - devices come from everywhere; mutual TLS decides who stays
    link_port: Port = 9443  # 0: any free one, written to ports.json
    enrolment_port: Port = 9444


@dataclass(frozen=True, slots=True, config=_STRICT)
class Public:
    """`[public]`: names and addresses in the server's certificate; the first goes into join strings."""

    names: Annotated[tuple[Name, ...], Field(min_length=1)] = ("localhost",)


@dataclass(frozen=True, slots=True, config=_STRICT)
class Database:
    """`[database]`: an SQLAlchemy URL; empty: SQLite in the home folder."""

    url: str = ""


@dataclass(frozen=True, slots=True, config=_STRICT)
class Limits:
    """`[limits]`: how long the hub waits for devices, in seconds."""

    offline_grace_s: Seconds = 60  # away longer with an open message: the message fails, the round goes on
    default_deadline_s: Seconds = 3600  # of a round whose configuration names none
    max_connection_age_s: Seconds = 3600  # then a device connects anew, and shows its certificate again


@dataclass(frozen=True, slots=True, config=_STRICT)
class Certificates:
    """`[certificates]`: how long new ones are valid."""

    device_hours: Annotated[int, Field(ge=1, le=24 * 365, strict=True)] = 168
    server_days: Annotated[int, Field(ge=1, le=825, strict=True)] = 90


@dataclass(frozen=True, slots=True, config=_STRICT)
class Workers:
    """`[workers]`: processes of runs."""

    restarts: Annotated[int, Field(ge=0, le=1000, strict=True)] = 3  # of one that dies without finishing


@dataclass(frozen=True, slots=True, config=_STRICT)
class Delivery:
    """`[delivery]`: who signs releases, and for how long; see docs/releases.md."""

    signers: tuple[str, ...] = ()  # unix sockets of signer processes, one for each tier's key
    signer_timeout_s: Seconds = 30  # for one answer of a signer
    seal: bool = True  # whether models are encrypted for the devices of their tier, see docs/sealing.md
    keep: Annotated[int, Field(ge=1, le=16, strict=True)] = 4  # releases that a tier offers at a time
    root_days: Days = 365  # lifetimes of what is signed from now on
    targets_days: Days = 365
    tier_days: Days = 90
    snapshot_days: OnlineDays = 7
    timestamp_days: OnlineDays = 2


@dataclass(frozen=True, slots=True, config=_STRICT)
class Inference:
    """`[inference]`: answers of global models for devices that are not sure; see docs/inference.md."""

    enabled: bool = True  # releases are exported when they are published, and devices may ask
    max_examples: Count = 256  # of one request
    batch_examples: Count = 64  # that go through a model at once
    batch_wait_s: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.002  # for others, of a batch's first
    waiting_examples: Count = 1024  # of one model; beyond that requests are refused at once
    in_flight: Count = 16  # requests of one device at a time
    models: Annotated[int, Field(ge=1, le=1000, strict=True)] = 4  # releases that are open at a time
    model_bytes: Annotated[int, Field(ge=1, le=1024**4, strict=True)] = 1024**3  # of their files together
    threads: Annotated[int, Field(ge=1, le=1024, strict=True)] = 1  # that run models
    deadline_s: Annotated[float, Field(gt=0, le=3600, strict=True)] = 10.0  # the longest that a request has

    def limits(self) -> InferenceLimits:
        """For the service.

        Raises:
            ConfigError: two that do not fit together.
        """
        return InferenceLimits(**{name: getattr(self, name) for name in InferenceLimits.__dataclass_fields__})


@dataclass(frozen=True, slots=True, config=_STRICT)
class Keeping:
    """`[keeping]`: how much of what is old keeps its bytes; see docs/releases.md."""

    automatic: bool = True  # the hub removes what is not kept, once an hour
    releases: Count = 16  # of each tier: the newest
    runs: Count = 100  # that are over: the newest
    unseen_days: Days = 90  # what a device runs is kept for so long after it was seen last

    def terms(self) -> Keep:
        """For the rule."""
        return Keep(self.releases, self.runs, self.unseen_days * 86_400)


@dataclass(frozen=True, slots=True, config=_STRICT)
class Metrics:
    """`[metrics]`: where Prometheus may ask, over plain HTTP; see docs/monitoring.md."""

    listen: str = ""  # HOST:PORT; empty: nowhere
    allow_remote: bool = False  # let it be an address that others can reach: nothing is asked of who asks

    def __post_init__(self) -> None:
        """Refuse what is no address, and one that others reach unless that was allowed."""
        if self.place is None or self.allow_remote:
            return
        host = self.place[0]
        if not ipaddress.ip_address(host).is_loopback:
            raise ValueError(
                f"metrics.listen = {self.listen!r}: others can reach it, and whoever asks is answered; "
                "use 127.0.0.1, or allow it with metrics.allow_remote = true"
            )

    @property
    def place(self) -> tuple[str, int] | None:
        """Address and port; None: nowhere.

        Raises:
            ValueError: it is none.
        """
        if not self.listen:
            return None
        host, _, port = self.listen.rpartition(":")
        try:
            found = str(ipaddress.ip_address(host.strip("[]"))), int(port)
        except ValueError:
            found = "", -1
        if not 0 <= found[1] <= 65535:
            raise ValueError(
                f"metrics.listen = {self.listen!r}: must be ADDRESS:PORT, as 127.0.0.1:9445 or [::1]:9445"
            )
        return found


@dataclass(frozen=True, slots=True, config=_STRICT)
class Rollouts:
    """`[rollouts]`: whether a release that was signed begins its rollouts by itself; see docs/rollout.md."""

    automatic: bool = False
    plan: str = ""  # TOML, a path relative to the home; empty: stages of 5, 25 and 100 percent


@dataclass(frozen=True, slots=True, config=_STRICT)
class Telemetry:
    """`[telemetry]`: what devices tell of their answers, and when drift is an alarm; docs/telemetry.md."""

    enabled: bool = True
    keep_days: Days = 90
    most_windows: Count = 2400  # of a device; of more the oldest go
    least_period_s: Count = 60  # windows of devices that are shorter are refused
    watch_period_s: Seconds = 3600  # the period in which false alarms are counted
    false_alarms: Annotated[float, Field(gt=0, lt=1, strict=True)] = 0.01  # within `periods` without a change
    periods: Count = 100
    at_least: Count = 3  # devices; fewer raise no alarm by themselves
    baseline: Count = 5  # windows of a device that it is compared with
    least_answers: Count = 30  # in a window; one with fewer is not looked at for drift

    def storing(self) -> TelemetrySettings:
        """For the store."""
        drift = {name: getattr(self, name) for name in DriftSettings.__dataclass_fields__}
        return TelemetrySettings(
            keep_s=self.keep_days * 86_400,
            most_windows=self.most_windows,
            least_period_s=self.least_period_s,
            watch_period_s=self.watch_period_s,
            drift=DriftSettings(**drift),
        )


@dataclass(frozen=True, slots=True, config=_STRICT)
class Settings:
    """The whole file."""

    listen: Listen = field(default_factory=Listen)
    public: Public = field(default_factory=Public)
    database: Database = field(default_factory=Database)
    limits: Limits = field(default_factory=Limits)
    certificates: Certificates = field(default_factory=Certificates)
    workers: Workers = field(default_factory=Workers)
    delivery: Delivery = field(default_factory=Delivery)
    rollouts: Rollouts = field(default_factory=Rollouts)
    inference: Inference = field(default_factory=Inference)
    telemetry: Telemetry = field(default_factory=Telemetry)
    metrics: Metrics = field(default_factory=Metrics)
    keeping: Keeping = field(default_factory=Keeping)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> Settings:
        """Check a nested mapping, as a TOML file gives it.

        Raises:
            ConfigError: an unknown key or an unusable value.
        """
        try:
            found = _ADAPTER.validate_python(values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from error
        found.inference.limits()  # whether they fit together
        if found.keeping.releases < found.delivery.keep:
            raise ConfigError(
                f"keeping.releases = {found.keeping.releases}: must be at least delivery.keep = "
                f"{found.delivery.keep}, which devices are offered"
            )
        return found

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read `server.toml`.

        Raises:
            ConfigError: the file is absent or no TOML, or a key or value is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"settings {path}: there are none; make a home with fedge-server init"
            ) from error
        except OSError as error:
            raise ConfigError(f"settings {path}: cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"settings {path}: not valid TOML ({error})") from error
        try:
            return cls.from_mapping(values)
        except ConfigError as error:
            raise ConfigError(f"settings {path}: {error}") from error

    @property
    def database_url(self) -> str | None:
        """For `Registry.open`: None means SQLite in the home folder."""
        return self.database.url or None


_ADAPTER = TypeAdapter(Settings)
_SECTIONS: dict[str, Any] = {
    "listen": Listen,
    "public": Public,
    "database": Database,
    "limits": Limits,
    "certificates": Certificates,
    "workers": Workers,
    "delivery": Delivery,
    "rollouts": Rollouts,
    "inference": Inference,
    "telemetry": Telemetry,
    "metrics": Metrics,
    "keeping": Keeping,
}


def _one_line(error: ValidationError) -> str:
    details = error.errors()
    detail = details[0]
    path = [str(part) for part in detail["loc"]]
    key = ".".join(path) if ".".join(path).isprintable() else repr(path)
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        valid = list(_SECTIONS) if len(path) == 1 else list(_SECTIONS[path[0]].__dataclass_fields__)
        line = f"unknown key '{key}': {suggestion(path[-1], valid)}"
    elif detail["type"] == "value_error":
        line = str(detail["ctx"]["error"])
    elif detail["type"] == "dataclass_type":
        line = f"{key} = {detail['input']!r}: must be a table"
    elif detail["type"] == "string_pattern_mismatch":
        line = f"{key} = {detail['input']!r}: must be a host name or an address"
    else:
        line = f"{key} = {detail['input']!r}: {detail['msg'].removeprefix('Input ')}"
    return line + (f" (and {len(details) - 1} more)" if len(details) > 1 else "")
