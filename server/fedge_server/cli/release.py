"""`fedge-server release`: what was signed for devices, what waits to be, and where each came from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge import cli
from fedge.errors import UserError
from fedge_server.cli.place import show, who
from fedge_server.cli.runs import open_registry

if TYPE_CHECKING:
    from fedge_server.registry.database import Registry
    from fedge_server.registry.drafts import Draft


def add(commands: Any) -> None:
    """Add the subcommands."""
    about = "what devices can install: ls, show, publish, export, prune"
    group = commands.add_parser("release", help=about, description=about)
    inner = group.add_subparsers(required=True, metavar="COMMAND")
    example = "  fedge-server release ls --home out/digits"
    made = cli.subcommand(
        inner, "ls", _ls, summary="list releases, and drafts that await a signature", examples=example
    )
    _common(made)
    one = cli.subcommand(
        inner,
        "show",
        _show,
        summary="show where a release comes from: model, round, run, updates, gate, rollout",
        examples="  fedge-server release show 1 --home out/digits --format json\n"
        "  fedge-server release show --device 3fa9c2d4",
    )
    one.add_argument("which", metavar="VERSION", type=int, nargs="?")
    one.add_argument("--device", metavar="ID", help="the release that this device has reported last")
    _common(one)
    made = cli.subcommand(
        inner,
        "publish",
        _publish,
        summary="sign and publish a draft that awaits a signature, or the content of a release once more",
        examples="  fedge-server release publish 5b1f0c9e77aa\n"
        "  fedge-server release publish --again 3 --tier micro      (takes the fleet back to its content)",
    )
    made.add_argument("draft", metavar="DRAFT", nargs="?", help="as release ls shows it")
    made.add_argument("--again", type=int, metavar="VERSION", help="publish its content as a new version")
    made.add_argument("--tier", action="append", metavar="TIER", help="with --again: for these tiers alone")
    _common(made)
    made = cli.subcommand(
        inner,
        "export",
        _export,
        summary="write a stick for devices without a network, with keys wrapped for them alone",
        examples="  fedge-server release export /mnt/stick --device 3fa9c2d4 --device 771518e6\n"
        "  fedge-client install /mnt/stick      (on each of them)",
    )
    made.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that is empty, or made")
    made.add_argument(
        "--device", action="append", required=True, metavar="ID", help="for whom; give it once for each"
    )
    _common(made)
    _add_prune(inner)


def _add_prune(inner: Any) -> None:
    made = cli.subcommand(
        inner,
        "prune",
        _prune,
        summary="remove the bytes of old releases and runs, and what nothing needs; lineage stays",
        examples="  fedge-server release prune --dry-run\n"
        "  fedge-server release prune --keep 8 --home /var/lib/fedge",
    )
    made.add_argument(
        "--keep", type=int, metavar="N", help="newest releases of each tier (default: [keeping] releases)"
    )
    made.add_argument(
        "--runs", type=int, metavar="N", help="newest runs that are over (default: [keeping] runs)"
    )
    made.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    _common(made)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, metavar="DIR", help="home or run folder (default: FEDGE_HOME)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def _ls(arguments: argparse.Namespace) -> int:
    from fedge_server.release.lineage import all_removed, released

    _, registry = open_registry(arguments.home)
    with registry:
        releases, drafts = released(registry), registry.drafts.all(unpublished=True)
        removed = all_removed(registry)
    value = {
        "releases": [r.to_json() | {"removed": removed.get(r.version, {})} for r in releases],
        "drafts": [_draft_value(draft) for draft in drafts],
    }
    lines = [
        f"{r.version}  {r.task}  {r.created}  tiers: {', '.join(v.tier for v in r.variants)}"
        + (f"  bytes removed: {', '.join(sorted(removed[r.version]))}" if r.version in removed else "")
        for r in releases
    ] or ["no releases"]
    for draft in drafts:
        lines += _draft_lines(draft)
    return show(arguments, value, lines)


def _draft_value(draft: Draft) -> dict[str, Any]:
    return {
        "id": draft.id,
        "task": draft.release.task,
        "created": draft.created,
        "lineage": draft.release.to_json()["lineage"],
        "tiers": {
            each.tier: {"status": _status(each.status), "reason": each.reason, "release": each.release}
            for each in draft.variants
        },
    }


def _draft_lines(draft: Draft) -> list[str]:
    lines = [f"draft {draft.id}  {draft.release.task}  {draft.created[:19]}Z"]
    for each in draft.variants:
        why = f": {each.reason}" if each.reason else ""
        done = f" as {each.release}" if each.release else ""
        lines.append(f"  tier {each.tier}: {_status(each.status)}{done}{why}")
    return lines


def _status(status: str) -> str:
    return {"waiting": "awaiting signature"}.get(status, status)


def _show(arguments: argparse.Namespace) -> int:
    from fedge_server.release.lineage import release_of, running_on, story

    if (arguments.which is None) == (arguments.device is None):
        raise UserError("release show: give a VERSION, or --device ID")
    _, registry = open_registry(arguments.home)
    with registry:
        device, version = None, arguments.which
        if arguments.device is not None:
            device = running_on(registry, _device_id(registry, arguments.device))
            version = device["version"]
        value = story(registry, release_of(registry, version))
    lines = _story_lines(value)
    if device is not None:
        value |= {"device": device}
        lines.insert(0, f"device {device['id'][:16]} of tier {device['tier']} runs release {version}")
    return show(arguments, value, lines)


def _device_id(registry: Registry, given: str) -> str:
    found = [row.id for row in registry.devices.all() if row.id.startswith(given)]
    if len(found) != 1:
        what = "there is none" if not found else f"{len(found)} devices begin so"
        raise UserError(f"device {given[:64]!r}: {what}; see fedge-server devices ls")
    return found[0]


def _story_lines(value: Mapping[str, Any]) -> list[str]:
    from fedge_server.registry.living import when

    lineage, record, origin = value["lineage"], value["round"], value["origin"]
    lines = [
        f"release {value['version']} of task {value['task']}, {value['created']}",
        f"from global model {lineage['global_model'][:16]} of run {lineage['run']}, round {lineage['round']}",
    ]
    if origin:
        lines.append(f"that run {_began(origin)}")
    if record:
        lines.append(f"which aggregated {record['clients']} updates, together {record['updates'][:16]}")
    for entry in value["variants"]:
        lines += _variant_lines(entry, value["reports"][entry["tier"]], value["rollouts"][entry["tier"]])
        if (retired := value["removed"].get(entry["tier"])) is not None:
            lines.append(f"  bytes: removed {when(retired)}")
    return lines


def _variant_lines(
    entry: Mapping[str, Any], report: Mapping[str, Any], rollout: Mapping[str, Any] | None
) -> list[str]:
    from fedge.routing import KEY, Routing

    evidence = entry["evidence"]
    figures = (
        f"accuracy {evidence.get('accuracy', 0):.4f}, "
        f"drop at most {100 * evidence.get('drop_upper', 1):.2f} points"
    )
    digest = entry["evidence_sha256"][:16]
    size = f"{entry['wire_bytes']:,} bytes"
    lines = [f"tier {entry['tier']}: {entry['recipe']}, {size}, {figures}, evidence {digest}"]
    if report:
        lines.append(
            f"  gate: {'passed' if report.get('passed') else 'not passed'} on {report.get('n')} examples, "
            f"{100 * report.get('max_drop', 0):.2f} points allowed"
        )
    if (said := evidence.get(KEY)) is not None:
        lines.append(f"  cloud: {Routing.from_json(said).describe()}")
    if rollout:
        reason = f" ({rollout['reason']})" if rollout["reason"] else ""
        lines.append(f"  rollout: {str(rollout['status']).replace('_', ' ')}{reason}")
    return lines


def _began(origin: Mapping[str, Any]) -> str:
    """By digest, which leads on to the release or the run that it was."""
    verb = "began with the weights of" if origin["how"] == "start" else "was taught at first by"
    return f"{verb} {origin['from']}, global model {str(origin['sha256'])[:16]}"


def _publish(arguments: argparse.Namespace) -> int:
    from fedge_server.release import REPOSITORY, ReleasePlace, draft_again, publish_draft

    if (arguments.draft is None) == (arguments.again is None):
        raise UserError("release publish: give a DRAFT, or --again VERSION")
    if arguments.tier and arguments.again is None:
        raise UserError("--tier: only with --again; a draft is published for all its tiers that can be")
    home, registry = open_registry(arguments.home)
    with registry:
        draft = arguments.draft or draft_again(registry, arguments.again, arguments.tier)
        done = publish_draft(ReleasePlace.of(home.root), registry, draft, who=who())
    value = {
        "draft": done.draft,
        "release": done.release.version if done.release else None,
        "waiting": {
            each.tier: {"status": "refused" if each.is_refused else "awaiting signature", "reason": each.why}
            for each in done.waiting
        },
    }
    show(arguments, value, done.lines(home.root / REPOSITORY) or ["nothing to do: it is published"])
    return 1 if done.waiting else 0


def _export(arguments: argparse.Namespace) -> int:
    from fedge_server.release import REPOSITORY, ReleasePlace
    from fedge_server.repository.stick import write_stick

    home, registry = open_registry(arguments.home)
    with registry:
        rows = [registry.devices.get(_device_id(registry, given)) for given in arguments.device]
    devices = [row for row in rows if row is not None]
    keys = ReleasePlace.of(home.root).content_keys
    stick = write_stick(home.root / REPOSITORY, keys, arguments.folder, devices)
    expires = stick.expires.strftime("%Y-%m-%dT%H:%M:%SZ")
    value = {
        "folder": str(arguments.folder),
        "tiers": list(stick.tiers),
        "devices": [device.id for device in devices],
        "keys": stick.keys,
        "bytes": stick.size,
        "expires": expires,
    }
    line = (
        f"written to {arguments.folder}: tiers {', '.join(stick.tiers)}, {stick.keys} wrapped keys for "
        f"{len(devices)} devices, {stick.size:,} bytes; devices take it until {expires}"
    )
    return show(arguments, value, [line])


def _prune(arguments: argparse.Namespace) -> int:
    from fedge_server.hub.settings import Settings
    from fedge_server.retention.pruning import prune

    home, registry = open_registry(arguments.home)
    settings = Settings.load(home.settings) if home.settings.exists() else Settings()
    keep = settings.keeping.terms()
    keep = replace(
        keep,
        releases=keep.releases if arguments.keep is None else arguments.keep,
        runs=keep.runs if arguments.runs is None else arguments.runs,
    )
    if keep.releases < settings.delivery.keep:
        raise UserError(
            f"--keep {keep.releases}: a tier offers {settings.delivery.keep} releases ([delivery] keep); "
            "keep at least these"
        )
    with registry:
        done = prune(home, registry, keep, who=who(), dry=arguments.dry_run)
    value = {
        "releases": {str(version): tiers for version, tiers in done.retired.tiers.items()},
        "drafts": sorted({draft for draft, _ in done.retired.drafts}),
        "runs": sorted(done.retired.runs),
        "files": done.files,
        "bytes": done.size,
        "dry_run": arguments.dry_run,
    }
    word = "would remove" if arguments.dry_run else "removed"
    return show(arguments, value, [*done.retired.lines(), f"{word} {done.files} files, {done.size:,} bytes"])
