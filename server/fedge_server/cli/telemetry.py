"""`fedge-server telemetry`: what devices have counted of their answers, and the evidence of drift in it."""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import add_home, show, table
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge_server.drift.watch import Alarm
    from fedge_server.hub.settings import Telemetry as Settings
    from fedge_server.telemetry.store import Telemetry


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "what devices count of their answers: ls, show"
    group = commands.add_parser("telemetry", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    made = cli.subcommand(
        inner,
        "ls",
        _ls,
        summary="a line for each tier and release: requests, latency, confidence, drift",
        examples="  fedge-server telemetry ls\n  fedge-server telemetry ls --days 1 --format json",
    )
    _add_which(made)
    made = cli.subcommand(
        inner,
        "show",
        _show,
        summary="one tier under a release: how it answers, and the evidence of drift by stream",
        examples="  fedge-server telemetry show micro            (its newest release)\n"
        "  fedge-server telemetry show micro 3 --tag north --days 7 --format json",
    )
    made.add_argument("tier", metavar="TIER")
    made.add_argument("version", metavar="VERSION", type=int, nargs="?", help="default: the newest")
    _add_which(made)


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tag", metavar="TAG", help="windows of devices that had this tag alone")
    parser.add_argument("--days", type=float, metavar="N", help="windows of so many days alone")
    add_home(parser)


def _ls(arguments: argparse.Namespace) -> int:
    from fedge_server.telemetry.store import Telemetry

    settings = _settings(arguments)
    _, registry = open_registry(arguments.home)
    with registry:
        store = Telemetry(registry.engine, settings.storing())
        asked = [(*place, _asked(store, settings, arguments, *place)) for place in store.places()]
    found = [(tier, version, facts) for tier, version, facts in asked if facts is not None]
    rows = [
        ["tier", "release", "devices", "requests", "errors", "cloud", "confidence", "p50", "p95", "drift"]
    ]
    rows += [[tier, str(version), *_cells(facts)] for tier, version, facts in found]
    value = [{"tier": tier, "release": version, **facts} for tier, version, facts in found]
    return show(arguments, value, table(rows) if found else ["no window has come"])


def _show(arguments: argparse.Namespace) -> int:
    from fedge_server.telemetry.store import Telemetry

    tier, version, settings = arguments.tier, arguments.version, _settings(arguments)
    _, registry = open_registry(arguments.home)
    with registry:
        store = Telemetry(registry.engine, settings.storing())
        if version is None:
            version = max((newest for name, newest in store.places() if name == tier), default=0)
        facts = _asked(store, settings, arguments, tier, version)
    if facts is None:
        raise UserError(
            f"tier {tier!r}: no window of release {version} is kept; see fedge-server telemetry ls"
        )
    value = {"tier": tier, "release": version, **facts}
    return show(arguments, value, [f"{name:<25} {said}" for name, said in _lines(value)])


def _settings(arguments: argparse.Namespace) -> Settings:
    from fedge_server.hub.home import Home
    from fedge_server.hub.settings import Settings, Telemetry

    if arguments.days is not None and not 0 < arguments.days < 1e5:
        raise UserError(f"--days {arguments.days:g}: must be above 0")
    home = Home.chosen(arguments.home)
    return Settings.load(home.settings).telemetry if home.settings.exists() else Telemetry()


def _asked(
    store: Telemetry, settings: Settings, arguments: argparse.Namespace, tier: str, version: int
) -> dict[str, Any] | None:
    """What is known of a tier under a release; None: no window of those that are asked for."""
    since = 0.0 if arguments.days is None else time.time() - arguments.days * 86_400
    summary = store.summary(tier, version, tag=arguments.tag, since=since)
    if summary is None:
        return None
    watch, threshold = store.watch(tier, version), settings.periods / settings.false_alarms
    drift = {
        "windows": watch.windows,
        "evidence": _plain(watch.log_evidence),
        "threshold": threshold,
        "streams": {name: _plain(evidence.log) for name, evidence in watch.evidence.items()},
        "alarm": None if watch.alarm is None else _alarm(watch.alarm, settings),
    }
    return {**summary.to_json(), "drift": drift}


def _alarm(alarm: Alarm, settings: Settings) -> dict[str, Any]:
    from fedge_server.identity.admission import show_time

    since = show_time(alarm.period * settings.watch_period_s)
    return {"stream": alarm.stream, "since": since, "evidence": _plain(alarm.log_evidence)}


def _plain(log: float) -> float:
    """Evidence from its natural logarithm."""
    return float(f"{math.exp(min(log, 700.0)):.4g}")


def _cells(facts: dict[str, Any]) -> list[str]:
    drift, latency = facts["drift"], facts["latency"]
    word = f"{drift['evidence']:.3g} of {drift['threshold']:,.0f}"
    if alarm := drift["alarm"]:
        word = f"ALARM {alarm['stream']} since {alarm['since']}"
    return [
        str(facts["devices"]),
        str(facts["requests"]),
        f"{facts['errors']:.2%}",
        f"{facts['sent_to_cloud']:.2%}",
        f"{facts['confidence']:.3f}" if "confidence" in facts else "",
        *(f"{1000 * latency[name]:.3g} ms" if name in latency else "" for name in ("p50_s", "p95_s")),
        word,
    ]


def _lines(facts: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        full = f"{before} {name}".strip()
        if isinstance(value, dict):
            found += _lines(value, full)
        elif isinstance(value, float):
            found.append((full, f"{value:.5g}"))
        elif isinstance(value, list):
            found.append((full, " ".join(map(str, value))))
        else:
            found.append((full, "none" if value is None else str(value)))
    return found
