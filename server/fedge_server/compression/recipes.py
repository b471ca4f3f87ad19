"""Which versions of the global model are worth trying, and the workshop that builds each of them once."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fedge.config import Config, Prune
from fedge.dataset import Examples
from fedge.errors import CompressionError, FedgeError
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import Task
from fedge_server.compression.distil import distil, preprocessed
from fedge_server.compression.export import export
from fedge_server.compression.prune import prune
from fedge_server.compression.quantise import MAX_CALIBRATION, quantise


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network to be had from the global model: itself, itself pruned, or a student."""

    prune_ratio: float = 0.0  # share of channels removed; 0: none
    student: str = ""  # a student of the task, or empty

    @property
    def name(self) -> str:
        """Such as 'prune50' or 'student-small'; empty for the global model itself."""
        if self.student:
            return f"student-{self.student}"
        return f"prune{100 * self.prune_ratio:g}" if self.prune_ratio else ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A candidate: an architecture, as float32 or int8."""

    architecture: Architecture
    int8: bool

    @property
    def name(self) -> str:
        """'fp32', 'int8', 'prune50+int8', 'student-small', 'student-small+int8'."""
        if not self.architecture.name:
            return "int8" if self.int8 else "fp32"
        return self.architecture.name + ("+int8" if self.int8 else "")


def recipes(task: Task, settings: Prune, *, proxy: bool) -> tuple[Recipe, ...]:
    """All candidates of a task; without proxy data only the one that needs none.

    A student is offered as float32 too: for a tiny network int8 can be the larger and the slower one. A
    pruned global model is not: it is too large for that.
    """
    whole = Recipe(Architecture(), int8=False)
    if not proxy:
        return (whole,)
    pruned = [
        Recipe(Architecture(prune_ratio=ratio), int8=True) for ratio in sorted(set(settings.ratios)) if ratio
    ]
    students = [
        Recipe(Architecture(student=name), int8=int8) for name in task.students for int8 in (False, True)
    ]
    return (whole, replace(whole, int8=True), *pruned, *students)


class Workshop:
    """Builds candidates from one global model; a network or graph that several share is made once.

    `trained=False` leaves out all training: the sizes and speeds of networks that know nothing.
    """

    def __init__(
        self,
        teacher: WholeModel,
        task: Task,
        spec: Spec,
        data: Examples,
        config: Config,
        *,
        trained: bool = True,
    ) -> None:
        self._teacher = copy.deepcopy(teacher).eval()
        self._task, self._spec, self._data, self._config, self._trained = task, spec, data, config, trained
        self._inputs: torch.Tensor | None = None  # pre-processed training data
        self._networks: dict[Architecture, nn.Module] = {}
        self._graphs: dict[Architecture, bytes] = {}

    def build(self, recipe: Recipe) -> bytes:
        """The candidate as ONNX.

        Raises:
            CompressionError: a stage could not do its work; another candidate may still succeed.
        """
        graph = self._graph(recipe.architecture)
        if not recipe.int8:
            return graph
        order = np.random.default_rng(self._config.seed).permutation(len(self._data))
        return quantise(graph, self._data.x[order[:MAX_CALIBRATION]])

    def parameters(self, architecture: Architecture) -> int:
        """Number of parameters of the network.

        Raises:
            CompressionError: as `build`.
        """
        return sum(parameter.numel() for parameter in self._network(architecture).parameters())

    def _graph(self, architecture: Architecture) -> bytes:
        if architecture not in self._graphs:
            model = WholeModel(self._teacher.preprocess, self._network(architecture))
            self._graphs[architecture] = export(model, self._spec)
        return self._graphs[architecture]

    def _network(self, architecture: Architecture) -> nn.Module:
        if architecture not in self._networks:
            self._networks[architecture] = self._made(architecture)
        return self._networks[architecture]

    def _made(self, architecture: Architecture) -> nn.Module:
        settings, seed = self._config.compress, self._config.seed
        if architecture.student:
            network, learning = self._fresh(architecture.student), settings.distil
        elif architecture.prune_ratio:
            example = self._preprocessed()[:2]
            pruned = prune(
                self._teacher.network, example, architecture.prune_ratio, settings.prune, seed=seed
            )
            network = pruned.network
            learning = replace(
                settings.distil,
                epochs=settings.prune.recovery_epochs,
                learning_rate=settings.prune.recovery_learning_rate,
            )
        else:
            return self._teacher.network
        if not self._trained:
            return network.eval()
        y = torch.from_numpy(self._data.y)
        return distil(self._teacher.network, network, self._preprocessed(), y, learning, seed=seed)

    def _fresh(self, student: str) -> nn.Module:
        """An untrained student, its weights decided by the seed."""
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._config.seed)
                return self._task.students[student](self._spec)
        except FedgeError as error:
            raise CompressionError(f"student {student!r} cannot be built: {error}") from error

    def _preprocessed(self) -> torch.Tensor:
        if self._inputs is None:
            self._inputs = preprocessed(self._teacher.preprocess, self._data.x)
        return self._inputs
