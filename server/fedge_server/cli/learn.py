"""`fedge-server learn`: learn again when the world has changed, without a hand on it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge import cli
from fedge.errors import ConfigError, UserError
from fedge_server.cli.place import add_home, opened, show, table, who

if TYPE_CHECKING:
    from fedge_server.cli.place import Place
    from fedge_server.continual.learnings import Learning, Learnings
    from fedge_server.continual.state import Event
    from fedge_server.registry.database import Registry

_NO_HUB: Final = "no hub is up: it counts from the hub's next start"
_ENTRIES: Final = 10  # of the audit trail that `status` shows


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = (
        "rounds, compression, release and rollout again and again: start, status, now, pause, resume, stop"
    )
    group = commands.add_parser("learn", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    _add_start(inner)
    made = cli.subcommand(
        inner,
        "status",
        _status,
        summary="list what is learned again, or show one: where it stands, and why",
        examples="  fedge-server learn status\n  fedge-server learn status digits --format json",
    )
    made.add_argument("name", metavar="NAME", nargs="?", help="of one (default: all)")
    add_home(made)
    now = _add_change(inner, "now", _now, "begin a cycle by hand, whatever gap and budget say")
    now.add_argument("--reason", metavar="TEXT", help="kept in the audit trail")
    _add_change(inner, "pause", _pause, "begin no further cycle; one that is under way goes on")
    _add_change(inner, "resume", _resume, "begin cycles again")
    stop = _add_change(inner, "stop", _stop, "end the cycle under way, and its run")
    stop.add_argument("--reason", metavar="TEXT", help="kept in the audit trail")
    told = cli.subcommand(
        inner,
        "examples",
        _examples,
        summary="tell how many examples devices hold now, for the policy's new_examples",
        examples="  fedge-server learn examples 48000 digits",
    )
    told.add_argument("count", metavar="COUNT", type=int, help="all devices together")
    _add_name(told)
    _add_change(inner, "rm", _remove, "forget one; its runs and releases stay")


def _add_start(inner: Any) -> None:
    start = cli.subcommand(
        inner,
        "start",
        _start,
        summary="check a configuration and learn it again whenever its policy says so",
        examples="  fedge-server learn start digits.toml --policy learn.toml\n"
        "  fedge-server learn start digits.toml --name digits --set rounds.count=20\n\n"
        "  learn.toml holds keys such as:  every_s = 604_800\n"
        "                                  remember = 0.5\n"
        "  Again with the same name it changes configuration and policy.",
    )
    start.add_argument("config", type=Path, metavar="CONFIG.toml", help="what to learn, with its tiers")
    start.add_argument("--policy", type=Path, metavar="FILE", help="TOML (default: on drift, at most daily)")
    start.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    start.add_argument("--name", metavar="NAME", help="begins the names of its runs (default: the task's)")
    add_home(start)


def _add_change(inner: Any, name: str, run: cli.Command, summary: str) -> argparse.ArgumentParser:
    made = cli.subcommand(
        inner,
        name,
        run,
        summary=summary,
        examples=f"  fedge-server learn {name}\n  fedge-server learn {name} digits",
    )
    _add_name(made)
    return made


def _add_name(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", metavar="NAME", nargs="?", help="of which (default: the only one)")
    add_home(made)


def _start(arguments: argparse.Namespace) -> int:
    from fedge.config import Config
    from fedge_server.cli.runs import check
    from fedge_server.continual.learnings import NAME
    from fedge_server.continual.terms import Terms
    from fedge_server.rounds.remembering import check_remember

    terms = Terms.load(arguments.policy) if arguments.policy else Terms()
    config = Config.load(arguments.config, arguments.set)
    name = arguments.name or re.sub(r"[^A-Za-z0-9]+", "-", config.task).strip("-")[:32]
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name[:64]!r}: letters, digits, '.', '_' and '-', at most 32")
    if not config.tiers:
        raise ConfigError(f"{arguments.config}: names no tiers, so that there would be nothing to release")
    check_remember(Config.from_mapping(terms.config(config.to_mapping(), 1)))  # what a later cycle runs
    with _learnings(arguments) as (place, registry, learnings):
        check(config, registry)
        learning = learnings.start(name, config.task, config.to_mapping(), terms, who=who())
        return _said(arguments, place, learning)


def _status(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.learnings import subject
    from fedge_server.rollout.audit import Audit

    with _learnings(arguments) as (_, registry, learnings):
        if arguments.name is None:
            found = learnings.all()
            rows = [["name", "status", "cycle", "task", "tiers"]]
            rows += [[s.name, _word(s), str(s.state.cycle), s.task, ", ".join(s.tiers)] for s in found]
            lines = (
                table(rows) if found else ["nothing is learned again; see: fedge-server learn start --help"]
            )
            return show(arguments, [_value(each) for each in found], lines)
        learning = learnings.get(arguments.name)
        entries = Audit(registry.engine).entries(subject(learning.name), last=_ENTRIES)
    told: list[dict[str, Any]] = [
        {"at": each.at_ms / 1000, "who": each.who, "what": each.what, "why": each.why} for each in entries
    ]
    lines = _shown(learning)
    lines += [
        f"{_time(e['at'])}  {e['who']}: {e['what']}" + (f" ({e['why']})" if e["why"] else "") for e in told
    ]
    return show(arguments, _value(learning) | {"audit": told}, lines)


def _now(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.state import Asked

    return _happens(arguments, Asked(who(), arguments.reason or ""))


def _pause(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.state import Paused

    return _happens(arguments, Paused(who()))


def _resume(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.state import Resumed

    return _happens(arguments, Resumed(who()))


def _examples(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.state import Examples

    if arguments.count < 0:
        raise UserError(f"COUNT {arguments.count}: must be 0 or more")
    return _happens(arguments, Examples(arguments.count))


def _stop(arguments: argparse.Namespace) -> int:
    from fedge_server.continual.state import Stopped

    with _learnings(arguments) as (place, registry, learnings):
        learning = learnings.get(_name(learnings, arguments.name))
        learning = learnings.happened(learning.name, Stopped(who(), arguments.reason or ""))
        run = registry.run(learning.run_id)
        if run is not None and run["status"] in ("queued", "running"):
            registry.request_stop(learning.run_id)
        return _said(arguments, place, learning)


def _remove(arguments: argparse.Namespace) -> int:
    with _learnings(arguments) as (_, __, learnings):
        name = _name(learnings, arguments.name)
        learnings.remove(name, who=who())
    return show(arguments, {"name": name, "removed": True}, [f"learning {name}: removed"])


def _happens(arguments: argparse.Namespace, event: Event) -> int:
    with _learnings(arguments) as (place, _, learnings):
        learning = learnings.happened(_name(learnings, arguments.name), event)
        return _said(arguments, place, learning)


@contextmanager
def _learnings(arguments: argparse.Namespace) -> Iterator[tuple[Place, Registry, Learnings]]:
    from fedge_server.cli.runs import open_registry
    from fedge_server.continual.learnings import Learnings

    with opened(arguments) as place:
        _, registry = open_registry(place.home.root)
        with registry:
            yield place, registry, Learnings(registry.engine)


def _name(learnings: Learnings, given: str | None) -> str:
    """The one that is meant.

    Raises:
        UserError: there is none, or more than one.
    """
    if given is not None:
        return given
    names = [each.name for each in learnings.all()]
    if len(names) != 1:
        raise UserError(f"NAME: which one? learnings: {', '.join(names) or 'none'}")
    return names[0]


def _said(arguments: argparse.Namespace, place: Place, learning: Learning) -> int:
    from fedge_server.hub.control import refresh

    up = refresh(place.home)
    return show(arguments, _value(learning) | {"hub": up}, _shown(learning) + ([] if up else [_NO_HUB]))


def _word(learning: Learning) -> str:
    return learning.state.status.value + (", paused" if learning.state.paused else "")


def _shown(learning: Learning) -> list[str]:
    from fedge_server.continual.deciding import waits_until
    from fedge_server.continual.state import Status

    state, policy = learning.state, learning.terms.policy
    lines = [f"learning {learning.name}: {_word(learning)}, since {_time(state.since)}"]
    if state.status is not Status.WATCHING:
        lines.append(f"cycle {state.cycle}, run {learning.run_id}: {state.cause}: {state.why}")
    elif (wait := waits_until(policy, state)) > state.at:
        lines.append(f"no cycle begins by itself before {_time(wait)}")
    if state.failures:
        lines.append(f"the last {state.failures} cycles failed; each doubles the gap to the next")
    if state.alarm_since is not None:
        answered = "answered" if state.alarm_release <= state.answered else "not answered"
        lines.append(
            f"drift under release {state.alarm_release} since {_time(state.alarm_since)}, {answered}"
        )
    return lines


def _value(learning: Learning) -> dict[str, Any]:
    values = {"name": learning.name, "task": learning.task, "tiers": list(learning.tiers)}
    run = {"run": learning.run_id} if learning.state.cycle else {}
    return values | run | {"terms": learning.terms.to_json(), "state": learning.state.to_json()}


def _time(seconds: float) -> str:
    if seconds <= 0:
        return "the beginning"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
