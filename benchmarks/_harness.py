"""What every benchmark shares: two options, the description of the machine, the table, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

Row = Mapping[str, str | int | float]
"""One line of a table: column names with their units, the same ones in every row of a part."""

_LIBRARIES = ("numpy", "torch", "flwr", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    quick: bool  # less work, never other work
    json: Path
    only: tuple[str, ...] = ()  # parts to measure; none: all
    cache: Path = Path()  # where environments of other systems are kept
    data: Path = Path()  # where data sets lie
    started: float = field(default_factory=time.perf_counter)


def options(
    description: str,
    argv: Sequence[str] | None = None,
    parts: Sequence[str] = (),
    *,
    cache: bool = False,
    data: bool = False,
    data_for: str = "",
) -> Options:
    """Read `[--quick] [--only PART]... [--cache DIR] [--data-dir DIR] --json FILE`.

    Args:
        description: the script's docstring.
        argv: instead of the command line.
        parts: that can be measured by themselves; none: there is no --only.
        cache: other systems are installed: there is a --cache.
        data: it needs data sets that are not part of the project: there is a --data-dir.
        data_for: the part that needs them; the others can do without --data-dir.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less work (about a minute), never other work")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the figures go")
    if parts:
        parser.add_argument(
            "--only", choices=parts, action="append", default=[], help="measure this part; again for more"
        )
    if cache:
        parser.add_argument(
            "--cache",
            type=Path,
            default=Path.home() / ".cache" / "fedge-benchmarks",
            metavar="DIR",
            help="where the environments of other systems are kept; made at first use",
        )
    if data:
        parser.add_argument(
            "--data-dir",
            type=Path,
            required=not data_for,
            metavar="DIR",
            help="the folder with the data sets",
        )
    found = parser.parse_args(argv)
    if data_for and found.data_dir is None and (not found.only or data_for in found.only):
        others = " ".join(f"--only {part}" for part in parts if part != data_for)
        parser.error(f"part {data_for} needs --data-dir; without it ask for {others}")
    return Options(
        found.quick,
        found.json,
        tuple(found.only) if parts else (),
        found.cache.absolute() if cache else Path(),
        found.data_dir.absolute() if data and found.data_dir else Path(),
    )


def usable_cpus() -> int:
    """CPUs that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, Any]:
    """What the figures were measured on; called before the first measurement, its load is not our own."""
    return {
        "cpu": _cpu_name(),
        "cpus": usable_cpus(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: found for name in _LIBRARIES if (found := _version(name)) is not None},
        "load_1min": round(os.getloadavg()[0], 2),
    }


class OtherLoad:
    """Cores that everybody else kept busy since this was made: whether a machine was idle.

    Args:
        own_s: CPU seconds that the benchmark's own processes have used so far.
    """

    def __init__(self, own_s: Callable[[], float] = time.process_time) -> None:
        self._own_s = own_s
        self._wall, self._all, self._own = time.perf_counter(), _busy_s(), own_s()

    def cores(self) -> float:
        """Mean over the time since then."""
        others = (_busy_s() - self._all) - (self._own_s() - self._own)
        return max(others / (time.perf_counter() - self._wall), 0.0)


def _busy_s() -> float:
    """CPU seconds of the whole machine, idle and waiting for a disk left out (Linux: proc_stat(5))."""
    ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def publish(
    asked: Options, before: Mapping[str, Any], claims: Mapping[str, float], rows: Sequence[Row]
) -> None:
    """Print rows and claims, and write all of it.

    Args:
        asked: the command line.
        before: `machine()` before the first measurement.
        claims: each number that a document quotes, by its name.
        rows: the table; where the columns change, another one begins.
    """
    for _, alike in groupby(rows, key=tuple):  # parts may have columns of their own
        print(table(list(alike)))
    for name, value in claims.items():
        print(f"{name} = {value:.3g}")
    seconds = round(time.perf_counter() - asked.started, 1)
    content = {
        "machine": before,
        "quick": asked.quick,
        "seconds": seconds,
        "claims": dict(claims),
        "rows": [dict(row) for row in rows],
    }
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"{seconds} s in all; written: {asked.json}")


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, numbers to the right."""
    names = list(rows[0])
    lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    left = [isinstance(rows[0][name], str) for name in names]
    return "\n".join(
        "  ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return value if isinstance(value, str) else f"{value:,}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
