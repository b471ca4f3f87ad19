"""What a run starts from besides its seed: an earlier global model, or what that taught a new architecture.

`[model] start` takes an earlier model's weights over; where the classes are others its head is made anew.
`[model] distil_from` lets it teach a network of any architecture on the server's proxy data (Hinton et al.
2015). Either way the digest of the earlier model stands in round 0's record, so that one can walk back.

The earlier model's moments go along: its weights know inputs that were standardised by these.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from fedge import tensors
from fedge.config import Config, suggestion
from fedge.dataset import Examples
from fedge.errors import ConfigError, FedgeError
from fedge.learning.state import NamedArrays, arrays_of, load_arrays, names_of
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.task import Task
from fedge_server.compression.distil import distil, preprocessed
from fedge_server.data import ServerData
from fedge_server.registry.database import Registry
from fedge_server.rounds.moments import is_moment, kept_moments
from fedge_server.rounds.scoring import probabilities_of

MODEL_FILE: Final = "model.safetensors"  # in a run folder

_RELEASE = re.compile(r"release:([1-9]\d{0,14})")
_ABOUT: Final = "fedge"  # key of a model file's metadata
_MAX_LABELS_BYTES: Final = 2**16  # in it; more labels than that are left out


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier global model, as its file tells."""

    key: str  # of the configuration that names it, and its value: for messages
    arrays: NamedArrays  # parameters and buffers
    moments: Moments | None
    sha256: str  # of the file
    about: Mapping[str, Any]  # model, filter, labels; empty: somebody else wrote the file

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Its classes in their order; None: not known."""
        found = self.about.get("labels")
        return tuple(map(str, found)) if isinstance(found, list) else None


@dataclass(frozen=True, slots=True)
class Start:
    """What round 0 is made of."""

    arrays: NamedArrays
    asks_moments: bool  # clients are asked for theirs
    moments: Moments | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)  # for round 0's record


def about(config: Config, task: Task, spec: Spec) -> dict[str, str]:
    """Metadata of a model's file, by which a later run knows what it takes over."""
    labels = json.dumps(list(spec.labels))
    said = {"model": config.model.name or task.default_model, "filter": config.model.filter}
    known = {"labels": list(spec.labels)} if len(labels) <= _MAX_LABELS_BYTES else {}
    return {_ABOUT: json.dumps(said | known)}


def start_of(
    config: Config, task: Task, data: ServerData, registry: Registry | None, network: nn.Module
) -> Start:
    """What a run begins with.

    Args:
        config: of the run.
        task: of the run.
        data: the server's; its proxy data teach, its test data measure.
        registry: holds releases; None: there are none here.
        network: the run's, with its first weights.

    Raises:
        ConfigError: the earlier model cannot be found, or does not fit.
        CompressionError: the new network could not learn.
    """
    spec, model = data.spec, config.model
    standardises = model.standardise and spec.numeric
    if model.start is not None and model.distil_from is not None:
        raise ConfigError(
            "model.start, model.distil_from: a run begins with one of them; leave the other out"
        )
    if model.start is not None:
        earlier = _read("start", model.start, registry)
        _check_inputs(earlier, config, spec)
        arrays, renewed = adopted(earlier, network, heads(task, model.name, spec), spec.labels)
        asks = standardises and not earlier.about and earlier.moments is None
        origin = {"how": "start", "from": model.start, "sha256": earlier.sha256, "new": list(renewed)}
        return Start(arrays, asks, earlier.moments, origin)
    if model.distil_from is not None:
        return _taught(_read("distil_from", model.distil_from, registry), config, task, data, network)
    return Start(arrays_of(network), standardises)


def describe(origin: Mapping[str, Any]) -> str:
    """Where a run began, in a line; empty where it began with its seed alone."""
    if not origin:
        return ""
    source = f"{origin['from']} (sha256 {str(origin['sha256'])[:16]})"
    if origin["how"] == "distil_from":
        return (
            f"the new architecture was taught by {source}: accuracy {origin['accuracy_before']:.4f} before, "
            f"{origin['accuracy_after']:.4f} after, on the server's test data"
        )
    if not origin["new"]:
        return f"started from {source}, all of it"
    return (
        f"started from {source}; its classes are others, so these parts are new: {', '.join(origin['new'])}"
    )


def heads(task: Task, name: str, spec: Spec) -> frozenset[str]:
    """The parts of a model that one class more or less changes: they depend on what the classes are."""
    if spec.classes > 2:
        labels = spec.labels[:-1]
    else:
        labels = (*spec.labels, next(c for c in "abc\0" if c not in spec.labels))
    build = task.model(name)
    with torch.random.fork_rng(devices=[]):
        own, other = (build(each).state_dict() for each in (spec, replace(spec, labels=labels)))
    return frozenset(n for n, value in own.items() if n not in other or other[n].shape != value.shape)


def adopted(
    earlier: Earlier, network: nn.Module, head: frozenset[str], labels: tuple[str, ...]
) -> tuple[NamedArrays, tuple[str, ...]]:
    """The state that a network takes over, and the names of what it does not.

    Args:
        earlier: whose state.
        network: with its first weights, which the head keeps where the classes are others.
        head: names of what depends on the classes.
        labels: the run's classes in their order.

    Raises:
        ConfigError: a part is unknown or absent, or has another shape and does not depend on the classes.
    """
    first, given = arrays_of(network), earlier.arrays
    for name in given:
        if name not in first:
            raise ConfigError(
                f"{earlier.key}: has {name!r}, and this model no such ({suggestion(name, list(first))}); "
                "another architecture is taken over with model.distil_from"
            )
    for name in first:
        if name not in given:
            raise ConfigError(
                f"{earlier.key}: lacks {name!r} of this model ({suggestion(name, list(given))}); "
                "another architecture is taken over with model.distil_from"
            )
    odd = [name for name, value in first.items() if given[name].shape != value.shape]
    if wrong := [name for name in odd if name not in head]:
        raise ConfigError(
            f"{earlier.key}: {wrong[0]!r} is {given[wrong[0]].shape}, this model's {first[wrong[0]].shape}; "
            "set model.name and the data's shape as it was trained, or take model.distil_from"
        )
    others = bool(odd) or earlier.labels not in (None, labels)
    renewed = tuple(name for name in first if name in head) if others else ()
    kept = {n: v if n in renewed else given[n].astype(v.dtype) for n, v in first.items()}
    return kept, renewed


def check_start(config: Config, task: Task, data: ServerData, registry: Registry | None) -> None:
    """Find out before anything is written whether a run can begin so; errors as in `start_of`."""
    if config.model.distil_from is not None and config.model.start is None:
        _teacher(_read("distil_from", config.model.distil_from, registry), config, task, data)
        return
    with torch.random.fork_rng(devices=[]):
        network = task.model(config.model.name)(data.spec)
    start_of(config, task, data, registry, network)


def _teacher(earlier: Earlier, config: Config, task: Task, data: ServerData) -> nn.Module:
    spec = data.spec
    _check_inputs(earlier, config, spec)
    _check_labels(earlier, spec)
    if len(data.proxy) < 2:
        raise ConfigError(
            f"{earlier.key}: there are no proxy data to teach with; see evaluate.proxy_fraction"
        )
    return _network_of(earlier, task, spec)


def _taught(earlier: Earlier, config: Config, task: Task, data: ServerData, network: nn.Module) -> Start:
    """A network that has learned the earlier model's answers to the proxy data."""
    spec, teacher = data.spec, _teacher(earlier, config, task, data)
    preprocess = task.preprocess(spec, earlier.moments, config.model.filter)
    student = distil(
        teacher,
        network,
        preprocessed(preprocess, data.proxy.x),
        torch.from_numpy(data.proxy.y),
        config.compress.distil,
        seed=config.seed,
    )
    before, after = (_accuracy(WholeModel(preprocess, each), data.test) for each in (teacher, student))
    origin = {
        "how": "distil_from",
        "from": config.model.distil_from,
        "sha256": earlier.sha256,
        "accuracy_before": before,
        "accuracy_after": after,
    }
    return Start(arrays_of(student), asks_moments=False, moments=earlier.moments, origin=origin)


def whole_model(
    value: str, config: Config, task: Task, spec: Spec, registry: Registry | None
) -> tuple[WholeModel, str]:
    """An earlier model with its pre-processing, and the SHA-256 of its file.

    Args:
        value: a model file, a run folder, or "release:N" of the registry.
        config: of the task that it was trained for; `model.filter` must be the same.
        task: whose models or students it is one of.
        spec: of the data; its classes must be the model's.
        registry: holds releases; None: there are none here.

    Raises:
        ConfigError: it cannot be found, or does not fit.
    """
    earlier = _read("start", value, registry)
    _check_inputs(earlier, config, spec)
    _check_labels(earlier, spec)
    preprocess = task.preprocess(spec, earlier.moments, config.model.filter)
    return WholeModel(preprocess, _network_of(earlier, task, spec)), earlier.sha256


def _check_labels(earlier: Earlier, spec: Spec) -> None:
    if earlier.labels not in (None, spec.labels):
        raise ConfigError(
            f"{earlier.key}: its classes are {_few(earlier.labels or ())}, the data's {_few(spec.labels)}; "
            "only a model of the same classes in the same order can teach: take model.start for others"
        )


def _network_of(earlier: Earlier, task: Task, spec: Spec) -> nn.Module:
    """The network that a file holds: the one that it names, else the one whose parts are the file's."""
    shapes = {name: value.shape for name, value in earlier.arrays.items()}
    ladder = {f"{name}-{w}": of.of(w) for name, of in task.families.items() for w in of.widths}
    builders = {**ladder, **task.students, **task.models}
    named = str(earlier.about.get("model", ""))
    for name in [named] if named in builders else list(builders):
        try:
            network = builders[name](spec)
        except FedgeError:
            continue  # not for such inputs
        own = arrays_of(network)
        if {n: value.shape for n, value in own.items()} == shapes:
            load_arrays(network, {n: earlier.arrays[n].astype(own[n].dtype) for n in names_of(network)})
            return network.eval()
    raise ConfigError(
        f"{earlier.key}: is none of the models of task {task.name!r} on these inputs and classes "
        f"({', '.join(builders)}), so nobody knows how it answers"
    )


def _check_inputs(earlier: Earlier, config: Config, spec: Spec) -> None:
    moments, own = earlier.moments, str(earlier.about.get("filter", config.model.filter))
    if moments is not None and moments.count.shape != (spec.channels,):
        raise ConfigError(
            f"{earlier.key}: was trained on {len(moments.count)} channels or columns; the data have "
            f"{spec.channels}"
        )
    if own != config.model.filter:
        raise ConfigError(f"{earlier.key}: was trained with model.filter = {own!r}; set the same")


def _read(key: str, value: str, registry: Registry | None) -> Earlier:
    said = f"model.{key} = {value!r}"
    path = _path(said, value, registry)
    try:
        arrays, metadata = tensors.load(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FedgeError, OSError) as error:
        raise ConfigError(f"{said}: {error}") from error
    moments = kept_moments(arrays)
    state = {n: v for n, v in arrays.items() if v.dtype.kind == "f" and not is_moment(n)}
    if bad := next((n for n, v in state.items() if not np.isfinite(v).all()), None):
        raise ConfigError(f"{said}: {bad!r} holds NaN or infinite values")
    return Earlier(said, state, moments, digest, _about(metadata))


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(_ABOUT, "{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(said: str, value: str, registry: Registry | None) -> Path:
    match = _RELEASE.fullmatch(value)
    if match is None:
        path = Path(value)
        found = path / MODEL_FILE if path.is_dir() else path
        if not found.is_file():
            raise ConfigError(
                f"{said}: {found} does not exist; name a model file, a run folder or 'release:N'"
            )
        return found
    releases = {row["version"]: row for row in registry.releases()} if registry is not None else {}
    row = releases.get(int(match[1]))
    if row is None or registry is None:
        known = ", ".join(map(str, releases)) or "none here"
        raise ConfigError(f"{said}: there is no such release; releases: {known}")
    if not registry.store.has(row["global_model"]):
        raise ConfigError(
            f"{said}: its global model is not kept any more ([keeping] releases); name a newer release, "
            "or a file"
        )
    return registry.store.path(row["global_model"])


def _accuracy(model: WholeModel, test: Examples) -> float:
    return float((probabilities_of(model, test).argmax(1) == test.y).mean())


def _few(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
