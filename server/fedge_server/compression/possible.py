"""Before any training: can this task meet this tier's budgets at all?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import numpy_helper

from fedge.artefact import pack
from fedge.config import Config, DataKind, Tier
from fedge.dataset import Examples
from fedge.errors import CompressionError, ConfigError, FormatError
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.task import Task
from fedge_server.compression.budgets import Figure, figures, shortage
from fedge_server.compression.distil import check_augment, preprocessed
from fedge_server.compression.export import random_input
from fedge_server.compression.gate import smallest_provable
from fedge_server.compression.measure import Cost, measure
from fedge_server.compression.onnx_graph import copied, load
from fedge_server.compression.recipes import PRECISION, Architecture, Recipe, recipes
from fedge_server.compression.sources import OnServer, kind_of
from fedge_server.compression.workshop import Workshop
from fedge_server.data import ServerData

LATENCY_SLACK = 1.5  # a budget is refused only where the best measured is so many times above it
WEIGHT_SHARE = 0.5  # of the packed size of random weights: trained ones are taken to need at least that

_SAMPLE = 64  # inputs that set ranges where none are at hand
_SMALL = 16  # constants of fewer values are shapes and scales rather than weights


def check_possible(
    task: Task, spec: Spec, config: Config, sample: npt.NDArray[Any], *, gate: Examples | None = None
) -> None:
    """Refuse tiers that no candidate of the task can meet, from untrained networks, smallest first.

    What training will change is allowed for. Latency: refused only beyond `LATENCY_SLACK`. Bytes: random
    weights pack worst, so the size of a trained candidate is taken to be at least that of its graph with all
    weights 0, which is a true lower bound, plus `WEIGHT_SHARE` of what its random weights add (measured on
    trained networks: 0.85 to 1.03). Accuracy cannot be known, but too small a gate set proves nothing.

    It stops at the first candidate that fits each tier; a tier without budgets costs nothing.

    Args:
        task: its models and students are the candidates.
        spec: of the data.
        config: tiers, model and stages.
        sample: raw inputs (N, *spec.shape) of the server's proxy data, a few dozen; none at all means that
            there will be no proxy data, and then only the unchanged global model is a candidate.
        gate: the data that the gate will see; None leaves out what follows from its size.

    Raises:
        ConfigError: it names the tier, the budget, the best that can be had, and by which recipe.
    """
    data = Examples(sample, np.zeros(len(sample), dtype=np.int64))
    kind = kind_of(config, data, clients=True)
    for name, tier in config.tiers.items():
        if gate is not None and kind != "clients":
            _check_gate(name, tier, gate, spec, config)
    waiting: dict[str, dict[str, tuple[Figure, ...]]] = {
        name: {} for name, tier in config.tiers.items() if _has_budget(tier)
    }
    workshop = _workshop(task, spec, config, data, kind)
    candidates = recipes(task, config, teachable=kind != "none")
    if not waiting:
        return
    threads = {tier.threads for tier in config.tiers.values()}
    for recipe in _smallest_first(candidates, workshop):
        try:
            cost = measure(workshop.built_untrained(recipe), spec, threads=threads)
        except (CompressionError, FormatError):
            continue
        for name in list(waiting):
            waiting[name][recipe.name] = found = _generous(config.tiers[name], cost)
            if all(figure.met for figure in found):
                del waiting[name]
        if not waiting:
            return
    name, tried = next(iter(waiting.items()))
    raise ConfigError(
        f"tiers.{name}: no candidate of task {task.name!r} can meet it: {shortage(tried)}; "
        "raise the budget, or give the task a smaller student"
    )


def packed_floor(installed: bytes) -> int:
    """Bytes on the wire that a trained network of this graph will need at least; see `check_possible`."""
    empty = copied(load(installed))
    for tensor in empty.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind in "fi" and values.size >= _SMALL:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
    least = len(pack(empty.SerializeToString(deterministic=True)))
    return least + int(WEIGHT_SHARE * (len(pack(installed)) - least))


def _generous(tier: Tier, cost: Cost) -> tuple[Figure, ...]:
    return figures(
        tier,
        wire_bytes=packed_floor(cost.installed),
        memory_bytes=cost.memory_bytes,
        latency_us=cost.latency_us[tier.threads] * tier.slowdown,
        latency_slack=LATENCY_SLACK,
    )


def _has_budget(tier: Tier) -> bool:
    return any(
        limit is not None for limit in (tier.max_wire_bytes, tier.max_memory_bytes, tier.max_latency_ms)
    )


def _workshop(task: Task, spec: Spec, config: Config, data: Examples, kind: DataKind) -> Workshop:
    """A workshop around an untrained global model.

    Where the clients hold all data, ranges come from noise: sizes and speeds do not depend on them.

    Raises:
        ConfigError: the task has no such model, or the augmentation does not fit its inputs.
    """
    if kind == "clients":
        noise = random_input(spec, _SAMPLE, seed=config.seed)
        data, kind = Examples(noise, np.zeros(_SAMPLE, dtype=np.int64)), "labelled"
    moments = Moments.of(data.x, spec) if config.model.standardise and spec.numeric else None
    preprocess = task.preprocess(spec, moments, config.model.filter).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = task.model(config.model.name)(spec).eval()
    if len(data):
        check_augment(preprocessed(preprocess, data.x[:2]), config.compress.distil.augment)
    model = WholeModel(preprocess, network)
    nothing = data.take(np.arange(0))
    source = OnServer.of(kind, config, ServerData(spec, data, nothing, nothing), model)
    return Workshop(model, task, spec, source, config)


def _smallest_first(candidates: tuple[Recipe, ...], workshop: Workshop) -> list[Recipe]:
    """By number of parameters, the fewest bits first; what cannot even be made is left out.

    Of the forms whose weights are trained, the smallest alone: the others are larger and no faster.
    """
    sizes: dict[Architecture, int] = {}
    for architecture in dict.fromkeys(recipe.architecture for recipe in candidates):
        try:
            sizes[architecture] = workshop.parameters(architecture)
        except CompressionError:
            continue
    trained = [form for form in PRECISION if any(each.trained and each.form == form for each in candidates)]
    possible = [
        recipe
        for recipe in candidates
        if recipe.architecture in sizes and (not recipe.trained or recipe.form == trained[-1])
    ]
    return sorted(possible, key=lambda recipe: (sizes[recipe.architecture], -PRECISION.index(recipe.form)))


def _check_gate(name: str, tier: Tier, gate: Examples, spec: Spec, config: Config) -> None:
    """Refuse a limit that the gate's data is too little to show, however good the variant.

    Raises:
        ConfigError: it names the limit and the least that so many examples can show.
    """
    limits = [("max_drop", "", len(gate), tier.max_drop)]
    if tier.max_class_drop is not None:
        counts = np.bincount(gate.y, minlength=spec.classes)
        rarest = int(counts.argmin())
        rare = (f" of class {spec.labels[rarest]!r}", int(counts[rarest]))
        limits.append(("max_class_drop", *rare, tier.max_class_drop))
    for key, what, n, limit in limits:
        least = smallest_provable(n, config.compress.gate)
        if least > limit:
            raise ConfigError(
                f"tiers.{name}.{key} = {limit:g}: the {n} gate examples{what} cannot show a drop below "
                f"{least:.3g} even if nothing is lost; raise it, or keep more data for the gate "
                "(evaluate.holdout_fraction, evaluate.gate_fraction)"
            )
