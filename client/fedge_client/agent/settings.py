"""The device's own file `agent.toml`: the tasks that it offers, limits of its work, and what it tells.

Checked by hand: a device need not have pydantic.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge.errors import ConfigError, FormatError, UserError
from fedge.files import read_bounded
from fedge_client.agent.tables import known, number, seconds, section, text, whole, yes

if TYPE_CHECKING:
    from fedge_client.memory.memory import Settings as KeepingSettings
    from fedge_client.telemetry.settings import Settings

FILE: Final = "agent.toml"
MEMORY: Final = "memory"  # folder beside it, with a folder for each task
MAX_FILE_BYTES: Final = 1024**2
MAX_TAGS = MAX_TASKS = 64
LEAST_MEMORY_BYTES: Final = 500_000_000  # torch and flwr alone take about 350 MB of data segment

LEAST_INSTALL_BYTES: Final = 200_000_000  # onnxruntime and the TUF library, and a small model

MEASURES: Final = ("confidence", "margin", "entropy")  # of doubt, as `fedge.routing` has them
RULES: Final = ("release", *MEASURES, "device-only", "cloud-only")

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TASK = re.compile(r"[A-Za-z0-9_-]{1,64}|[A-Za-z_][\w.]{0,200}:[A-Za-z_]\w{0,63}")


@dataclass(frozen=True, slots=True)
class OfferedTask:
    """A task that this device offers; a server may name it, and nothing else."""

    name: str  # a built-in task, or package.module:TASK: found on this device, as the server calls it
    data: Path | None = None  # file or folder; None: the task brings its own
    label: str | None = None  # tables: the column that holds the label
    size: tuple[int, int] | None = None  # image folders: resize to (height, width)
    pin: str = ""  # the digest that the task must have; empty: any
    memory: Path | None = None  # folder of examples that were kept here; None: it trains on `data` alone

    def node_config(self, digest: str) -> dict[str, str]:
        """What the ClientApp is told of this task."""
        config = {"task": self.name, "digest": digest}
        if self.data is not None:
            config["data"] = str(self.data)
        if self.label is not None:
            config["data-label"] = self.label
        if self.size is not None:
            config["data-size"] = f"{self.size[0]}x{self.size[1]}"
        if self.memory is not None:
            config["memory"] = str(self.memory)
        return config


@dataclass(frozen=True, slots=True)
class Training:
    """Limits of the training process."""

    max_memory_bytes: int = 2_000_000_000  # of its data segment; 0: no limit
    threads: int = 1
    nice: int = 10  # 0 .. 19
    idle_unload_s: float = 600.0  # the process ends after so long without work; 0: never


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Limits of the connection."""

    max_cache_bytes: int = 2_000_000_000  # of models kept on disk
    backoff_max_s: float = 60.0  # between two attempts to connect


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """How this device gets its releases."""

    enabled: bool = True
    poll_s: float = 300.0  # that the server may let a question wait; 1 .. 600
    retry_s: float = 3600.0  # before a release that was refused here is tried again, about
    max_memory_bytes: int = 1_000_000_000  # of the installing process's data segment; 0: no limit
    nice: int = 10  # of the installing process, 0 .. 19
    answers: int = 20  # that the mean confidence must be of before it is reported; 0: it never is


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """What this device counts of its answers and tells the server."""

    enabled: bool = True  # counts only, never an input; see docs/telemetry.md
    period_s: int = 3600  # of a window
    epsilon: float | None = None  # of the noise, for one answer in a window; None: none
    most_epsilon: float | None = None  # over all windows; None: no limit
    keep: int = 200  # closed windows that wait for the server

    def collecting(self) -> Settings | None:
        """For whoever counts or sends; None: nothing is counted.

        Raises:
            ConfigError: a value is not possible.
        """
        from fedge_client.telemetry.settings import Settings  # numpy: only where it is counted

        try:
            made = Settings(
                period_s=self.period_s, epsilon=self.epsilon, most_epsilon=self.most_epsilon, keep=self.keep
            )
        except UserError as error:
            raise ConfigError(str(error)) from error
        return made if self.enabled else None


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """How much the memories of this device's tasks keep."""

    size: int = 500  # examples of a task
    max_bytes: int = 64 * 1024**2  # of its file
    balanced: bool = True  # labels get equal room

    def keeping(self) -> KeepingSettings:
        """For the memory.

        Raises:
            ConfigError: a value is not possible.
        """
        from fedge_client.memory.memory import Settings as KeepingSettings

        try:
            return KeepingSettings(self.size, self.max_bytes, self.balanced)
        except UserError as error:
            raise ConfigError(str(error)) from error


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """What this device tells a Prometheus of its owner's."""

    textfile: Path | None = None  # for the node exporter's textfile collector; None: nothing is written
    interval_s: float = 15.0  # between two writings; 1 .. 3600


@dataclass(frozen=True, slots=True)
class AskingSettings:
    """Whether this device asks the cloud where it is not sure, and how much."""

    enabled: bool = False
    private: bool = False  # no input ever leaves this device
    rule: str = "release"  # of RULES: who decides what is doubted; "release": what it carries
    threshold: float | None = None  # 0 .. 1, of a measure of doubt that `rule` names; ask above it
    share: float | None = None  # of requests that are sent at most, by the release's thresholds
    accuracy: float | None = None  # of device and cloud together, at least, by the release's thresholds
    deadline_s: float = 0.5  # of a request that names none; the cloud is waited for until just before
    per_hour: float = 3600.0  # examples that may be sent, over a long time
    burst: float = 100.0  # at once, after a quiet time


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """The whole file."""

    tags: tuple[str, ...] = ()
    tasks: tuple[OfferedTask, ...] = ()
    training: Training = field(default_factory=Training)
    link: LinkSettings = field(default_factory=LinkSettings)
    delivery: DeliverySettings = field(default_factory=DeliverySettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    joint: AskingSettings = field(default_factory=AskingSettings)


def load(path: Path) -> AgentSettings:
    """Read and check the file; the defaults, which offer no task, when there is none.

    Raises:
        ConfigError: it cannot be read, a key is unknown, or a value is not possible.
    """
    if not path.exists():
        return AgentSettings()
    try:
        found = tomllib.loads(read_bounded(path, MAX_FILE_BYTES).decode("utf-8"))
    except FormatError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not TOML ({error})") from error
    try:
        return parse(found, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(found: Mapping[str, Any], folder: Path) -> AgentSettings:
    """The settings that a parsed file states; data paths are relative to `folder`.

    Raises:
        ConfigError: a key is unknown, or a value is not possible.
    """
    known(
        "",
        found,
        ("tags", "tasks", "training", "link", "delivery", "telemetry", "memory", "metrics", "joint"),
    )
    tables = section("tasks", found.get("tasks", {}))
    if len(tables) > MAX_TASKS:
        raise ConfigError(f"tasks: {len(tables)} are given, at most {MAX_TASKS} can be offered")
    tasks = tuple(_task(name, table, folder) for name, table in tables.items())
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"tasks: {twice!r} is offered twice; one table for each task")
    return AgentSettings(
        _tags(found.get("tags", [])),
        tasks,
        _training(section("training", found.get("training", {}))),
        _link(section("link", found.get("link", {}))),
        _delivery(section("delivery", found.get("delivery", {}))),
        _telemetry(section("telemetry", found.get("telemetry", {}))),
        _memory(section("memory", found.get("memory", {}))),
        _metrics(section("metrics", found.get("metrics", {})), folder),
        _joint(section("joint", found.get("joint", {}))),
    )


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        raise ConfigError(f"tags = {value!r}: must be a list of at most {MAX_TAGS} words")
    for tag in value:
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise ConfigError(
                f"tags: {tag!r} is no tag; it has letters, digits, '.', '_' and '-', at most 64"
            )
    return tuple(dict.fromkeys(value))


def _task(table_name: str, value: Any, folder: Path) -> OfferedTask:
    where = f"tasks.{table_name}"
    table = section(where, value)
    known(where, table, ("task", "data", "label", "size", "digest", "memory"))
    name = text(where, table, "task", table_name)
    if not _TASK.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} names no task; use a built-in one or package.module:TASK")
    data, label, pin = (text(where, table, key, None) for key in ("data", "label", "digest"))
    if pin is not None and not _DIGEST.fullmatch(pin):
        raise ConfigError(f"{where}.digest = {pin!r}: must be 64 hexadecimal digits in lower case")
    # Absolute: the training process reads it from another folder.
    path = (folder / Path(data).expanduser()).absolute() if data is not None else None
    memory = (folder / MEMORY / name).absolute() if yes(f"{where}.memory", table, default=False) else None
    return OfferedTask(name, path, label, _size(where, table.get("size")), pin or "", memory)


def _size(where: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    right = isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
    if not right or not all(1 <= part <= 10_000 for part in value):
        raise ConfigError(f"{where}.size = {value!r}: must be [HEIGHT, WIDTH] in pixels")
    return value[0], value[1]


def _training(table: Mapping[str, Any]) -> Training:
    known("training", table, ("max_memory_bytes", "threads", "nice", "idle_unload_s"))
    usual = Training()
    made = Training(
        whole("training.max_memory_bytes", table, usual.max_memory_bytes, 0, 2**62),
        whole("training.threads", table, usual.threads, 1, 1024),
        whole("training.nice", table, usual.nice, 0, 19),
        seconds("training.idle_unload_s", table, usual.idle_unload_s),
    )
    if 0 < made.max_memory_bytes < LEAST_MEMORY_BYTES:
        raise ConfigError(
            f"training.max_memory_bytes = {made.max_memory_bytes}: torch needs {LEAST_MEMORY_BYTES} or more; "
            "0 sets no limit"
        )
    return made


def _link(table: Mapping[str, Any]) -> LinkSettings:
    known("link", table, ("max_cache_bytes", "backoff_max_s"))
    usual = LinkSettings()
    made = LinkSettings(
        whole("link.max_cache_bytes", table, usual.max_cache_bytes, 0, 2**62),
        seconds("link.backoff_max_s", table, usual.backoff_max_s),
    )
    if made.backoff_max_s < 1:
        raise ConfigError(f"link.backoff_max_s = {made.backoff_max_s}: must be 1 or more")
    return made


def _delivery(table: Mapping[str, Any]) -> DeliverySettings:
    usual = DeliverySettings()
    known("delivery", table, tuple(usual.__dataclass_fields__))
    made = DeliverySettings(
        yes("delivery.enabled", table, usual.enabled),
        seconds("delivery.poll_s", table, usual.poll_s),
        seconds("delivery.retry_s", table, usual.retry_s),
        whole("delivery.max_memory_bytes", table, usual.max_memory_bytes, 0, 2**62),
        whole("delivery.nice", table, usual.nice, 0, 19),
        whole("delivery.answers", table, usual.answers, 0, 2**31),
    )
    if not 1 <= made.poll_s <= 600:
        raise ConfigError(f"delivery.poll_s = {made.poll_s}: must be 1 to 600")
    if made.retry_s < 1:
        raise ConfigError(f"delivery.retry_s = {made.retry_s}: must be 1 or more")
    if 0 < made.max_memory_bytes < LEAST_INSTALL_BYTES:
        raise ConfigError(
            f"delivery.max_memory_bytes = {made.max_memory_bytes}: an installation needs "
            f"{LEAST_INSTALL_BYTES} or more; 0 sets no limit"
        )
    return made


def _telemetry(table: Mapping[str, Any]) -> TelemetrySettings:
    usual = TelemetrySettings()
    known("telemetry", table, tuple(usual.__dataclass_fields__))
    made = TelemetrySettings(
        yes("telemetry.enabled", table, usual.enabled),
        whole("telemetry.period_s", table, usual.period_s, 1, 2**31),
        seconds("telemetry.epsilon", table, None),
        seconds("telemetry.most_epsilon", table, None),
        whole("telemetry.keep", table, usual.keep, 1, 2**31),
    )
    if table:
        made.collecting()  # whether they fit together
    return made


def _memory(table: Mapping[str, Any]) -> MemorySettings:
    usual = MemorySettings()
    known("memory", table, tuple(usual.__dataclass_fields__))
    made = MemorySettings(
        whole("memory.size", table, usual.size, 1, 2**31),
        whole("memory.max_bytes", table, usual.max_bytes, 1, 2**62),
        yes("memory.balanced", table, usual.balanced),
    )
    if table:
        made.keeping()  # whether they are possible
    return made


def _metrics(table: Mapping[str, Any], folder: Path) -> MetricsSettings:
    usual = MetricsSettings()
    known("metrics", table, tuple(usual.__dataclass_fields__))
    named = text("metrics", table, "textfile", None)
    if named is not None and not named.endswith(".prom"):
        raise ConfigError(
            f"metrics.textfile = {named!r}: must end with .prom, else the collector passes it over"
        )
    path = None if named is None else (folder / Path(named).expanduser()).absolute()
    made = MetricsSettings(path, seconds("metrics.interval_s", table, usual.interval_s))
    if not 1 <= made.interval_s <= 3600:
        raise ConfigError(f"metrics.interval_s = {made.interval_s}: must be 1 to 3600")
    return made


def _joint(table: Mapping[str, Any]) -> AskingSettings:
    usual = AskingSettings()
    known("joint", table, tuple(usual.__dataclass_fields__))
    rule = table.get("rule", usual.rule)
    if rule not in RULES:
        raise ConfigError(f"joint.rule = {rule!r}: must be one of {', '.join(RULES)}")
    made = AskingSettings(
        yes("joint.enabled", table, usual.enabled),
        yes("joint.private", table, usual.private),
        rule,
        number("joint.threshold", table, None, 0, 1),
        _share("joint.share", table),
        _share("joint.accuracy", table),
        number("joint.deadline_s", table, usual.deadline_s, 0.01, 3600),
        number("joint.per_hour", table, usual.per_hour, 0, 10**9),
        number("joint.burst", table, usual.burst, 0, 10**9),
    )
    if (rule in MEASURES) != (made.threshold is not None):
        raise ConfigError(
            f"joint.rule = {rule!r}, joint.threshold = {made.threshold}: a measure of doubt needs a "
            "threshold, and no other rule has one"
        )
    if (made.share, made.accuracy) != (None, None) and (
        rule != "release" or None not in (made.share, made.accuracy)
    ):
        raise ConfigError("joint.share, joint.accuracy: one of them, and only with joint.rule = 'release'")
    return made


def _share(name: str, table: Mapping[str, Any]) -> float | None:
    value = number(name, table, None, 0, 1)
    if value in (0, 1):
        raise ConfigError(f"{name} = {value}: must be above 0 and below 1")
    return value
