"""`fedge-server rollout`: bring a release to a tier's devices in stages, watch it, stop it, and go back."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import add_home, show, table, who
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge_server.rollout.evidence import Criterion
    from fedge_server.rollout.plan import Plan
    from fedge_server.rollout.service import Rollouts
    from fedge_server.rollout.state import State


_EXACT = 400  # devices up to which a stage's chance is worked out: in no time


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "how a release reaches devices: start, status, pause, resume, rollback"
    group = commands.add_parser("rollout", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    _add_start(inner)
    made = cli.subcommand(
        inner,
        "status",
        _status,
        summary="list rollouts, or show one and its evidence",
        examples="  fedge-server rollout status\n  fedge-server rollout status micro-3 --format json",
    )
    made.add_argument("which", metavar="ID", nargs="?", help="of one rollout (default: all)")
    add_home(made)
    _add_change(inner, "pause", _pause, "offer the release to no further device for now", "looking at logs")
    made = _add_change(inner, "resume", _resume, "let a paused or halted rollout go on", "logs are fine")
    made.add_argument("--override", action="store_true", help="also over a halt: it is judged anew")
    made = _add_change(
        inner, "rollback", _rollback, "order the release before, or say which release brings it back", "slow"
    )
    made.add_argument(
        "--replacement",
        type=int,
        metavar="VERSION",
        help="a newer release that holds the old content: all devices get it, and none may go below it",
    )


def _add_start(inner: Any) -> None:
    made = cli.subcommand(
        inner,
        "start",
        _start,
        summary="begin to bring a release to devices",
        examples="  fedge-server rollout start 3\n"
        '  fedge-server rollout start 3 --tier micro --plan plan.toml --reason "round 40"',
    )
    made.add_argument("version", metavar="VERSION", type=int, help="of the release")
    made.add_argument(
        "--tier", action="append", default=[], metavar="TIER", help="only to this tier; again for more"
    )
    made.add_argument("--plan", type=Path, metavar="FILE", help="TOML (default: 5, 25, 100 percent)")
    made.add_argument("--reason", metavar="TEXT", help="kept in the audit trail")
    add_home(made)


def _add_change(inner: Any, name: str, run: cli.Command, summary: str, why: str) -> argparse.ArgumentParser:
    example = f'  fedge-server rollout {name} micro-3 --reason "{why}"'
    made = cli.subcommand(inner, name, run, summary=summary, examples=example)
    made.add_argument("which", metavar="ID", help="of the rollout")
    made.add_argument("--reason", required=True, metavar="TEXT", help="kept in the audit trail")
    add_home(made)
    return made


def _start(arguments: argparse.Namespace) -> int:
    from fedge_server.registry.engine import reading, writing
    from fedge_server.rollout import fleet
    from fedge_server.rollout.plan import Plan
    from fedge_server.rollout.service import Rollouts

    plan = Plan.load(arguments.plan) if arguments.plan else None
    _, registry = open_registry(arguments.home)
    with registry:
        with reading(registry.engine) as connection:
            tiers = arguments.tier or fleet.tiers_of(connection, arguments.version)
            for tier in tiers or [""]:  # all of them before the first one begins
                fleet.check_variant(connection, arguments.version, tier)
            devices = {tier: fleet.active(connection, tier) for tier in tiers}
        rollouts, why = Rollouts(registry), arguments.reason or ""
        with writing(registry.engine) as connection:  # for all of its tiers, or for none
            states = [
                rollouts.start_within(connection, arguments.version, tier, plan, who=who(), why=why)
                for tier in tiers
            ]
    lines = [line for state in states for line in (_line(state), *_chances(state, devices[state.tier]))]
    return show(arguments, [_value(state) for state in states], lines)


def _chances(state: State, devices: Sequence[str]) -> list[str]:
    """What each stage can find, worked out before a device has installed anything."""
    from fedge_server.rollout import fleet
    from fedge_server.rollout.evidence import chance_of_halt, devices_to_halt

    plan, rows = state.plan, []
    each = plan.false_halts_each
    counts = fleet.devices_by_stage(plan, state.id, list(devices))
    for stage, there in zip(plan.stages, counts, strict=True):
        looked = min(there, _EXACT)
        sure = "" if there == looked else ">"
        found = [
            f"{c.kind} {sure}{chance_of_halt(c, each, c.unacceptable, looked):.2f}" for c in plan.criteria
        ]
        rows.append(f"  {stage.name}: {there} devices; halts an unacceptable release with {', '.join(found)}")
    least = min(devices_to_halt(criterion, each) for criterion in plan.criteria)
    return [*rows, f"  no halt before {least} devices have reported something bad"]


def _status(arguments: argparse.Namespace) -> int:
    with _rollouts(arguments) as rollouts:
        found = [rollouts.get(arguments.which)] if arguments.which else rollouts.all()
    if arguments.which:
        return show(arguments, _value(found[0]), _shown(found[0]))
    rows = [["id", "status", "stage", "installed", "reason"]]
    rows += [[s.id, _words(s), _stage(s), str(s.tallies.installed), s.reason] for s in found]
    return show(arguments, [_value(state) for state in found], table(rows) if found else ["no rollouts"])


def _pause(arguments: argparse.Namespace) -> int:
    return _change(arguments, lambda r: r.pause(arguments.which, who=who(), why=_reason(arguments)))


def _resume(arguments: argparse.Namespace) -> int:
    why, override = _reason(arguments), arguments.override
    return _change(arguments, lambda r: r.resume(arguments.which, who=who(), why=why, override=override))


def _rollback(arguments: argparse.Namespace) -> int:
    def go_back(rollouts: Rollouts) -> State:
        state = rollouts.get(arguments.which)
        if not state.going_back:
            state = rollouts.rollback(arguments.which, who=who(), why=_reason(arguments))
        if arguments.replacement is None:
            return state
        return rollouts.replaced(arguments.which, arguments.replacement, who=who())

    return _change(arguments, go_back)


def _change(arguments: argparse.Namespace, change: Callable[[Rollouts], State]) -> int:
    with _rollouts(arguments) as rollouts:
        state = change(rollouts)
    return show(arguments, _value(state), _shown(state))


@contextmanager
def _rollouts(arguments: argparse.Namespace) -> Iterator[Rollouts]:
    """The rollouts of the home that a command line means."""
    from fedge_server.rollout.service import Rollouts

    _, registry = open_registry(arguments.home)
    with registry:
        yield Rollouts(registry)


def _value(state: State) -> dict[str, Any]:
    """A rollout as JSON shows it."""
    from fedge_server.identity.admission import show_time
    from fedge_server.rollout.service import wanted_content

    stage = state.current
    return {
        "id": state.id,
        "tier": state.tier,
        "version": state.version,
        "base": state.base or None,
        "status": str(state.status),
        "stage": stage.name if stage else None,
        "installed": state.tallies.installed,
        "needed": stage.min_installs if stage else None,
        "until": show_time(state.due) if state.due is not None else None,
        "reason": state.reason,
        "wanted_content": wanted_content(state),
        "replacement": state.replacement,
        "evidence": [_evidence(state, criterion) for criterion in state.plan.criteria],
        "plan": state.plan.to_json(),
    }


def _evidence(state: State, criterion: Criterion) -> dict[str, Any]:
    from fedge_server.rollout.evidence import log_ratio

    tally = state.evidence(criterion.kind)
    return {
        "kind": criterion.kind,
        "judged": tally.judged,
        "bad": tally.bad,
        "tolerated": criterion.tolerated,
        "log_ratio": log_ratio(criterion, tally),
        "halts_at": _halts_at(state.plan),
    }


def _halts_at(plan: Plan) -> float:
    return -math.log(plan.false_halts_each)


def _shown(state: State) -> list[str]:
    value = _value(state)
    names = (
        "id",
        "version",
        "base",
        "status",
        "stage",
        "installed",
        "needed",
        "until",
        "reason",
        "replacement",
    )
    lines = [f"{name:12} {value[name] if value[name] not in (None, '') else '-'}" for name in names]
    lines += [
        f"{each['kind']:12} {each['bad']} of {each['judged']} bad, tolerated {each['tolerated']:.1%}; "
        f"evidence {each['log_ratio']:+.2f}, halts at {each['halts_at']:.2f}"
        for each in value["evidence"]
    ]
    if value["wanted_content"]:
        lines.append(
            f"publish the content of release {value['wanted_content']} as a new version, then: "
            f"fedge-server rollout rollback {state.id} --replacement VERSION --reason TEXT"
        )
    return lines


def _line(state: State) -> str:
    return f"{state.id}: {_words(state)}, stage {_stage(state)}"


def _words(state: State) -> str:
    return str(state.status).replace("_", " ")


def _stage(state: State) -> str:
    return f"{state.current.name} ({state.stage + 1}/{len(state.plan.stages)})" if state.current else "-"


def _reason(arguments: argparse.Namespace) -> str:
    text = str(arguments.reason).strip()
    if not text:
        raise UserError("--reason: say why; it is kept in the audit trail")
    return text
