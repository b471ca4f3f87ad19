"""Builds candidates from one global model; what several share is made once, and kept for the next search."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from fedge.config import Config, Distil, FormName
from fedge.errors import CompressionError, FedgeError
from fedge.learning.state import NamedArrays, arrays_of, load_arrays
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.task import STUDENT, Task
from fedge_server.compression.distil import preprocessed
from fedge_server.compression.export import export
from fedge_server.compression.lowbit import Bits, frozen, prepared
from fedge_server.compression.prune import prune
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.shelf import Shelf
from fedge_server.compression.sources import Source
from fedge_server.compression.sparsify import sparsify

_BITS: dict[FormName, Bits] = {"w8": "int8", "w4": "int4", "ternary": "ternary", "binary": "binary"}

_ROUNDED: tuple[FormName, ...] = ("w8", "w4")  # whose values may be rounded from trained ones
# Of a student's training where it starts from what it learned before: less of it, and slower, since what a
# student does not need to change no device needs to fetch (docs/results.md). Where that makes it right more
# often by `_MOVED`, or leaves it far behind the global model, the world has moved: it learns as a new one
# does, and has to gain as much by it.
_WARM_EPOCHS, _GENTLE = 1 / 6, 0.03  # shares of the epochs and of the learning rate
_MOVED, _FAR = 0.01, 0.1

Say = Callable[[str], None]


class Workshop:
    """Networks and graphs of recipes.

    Args:
        teacher: the global model; it is not changed.
        task: its students can be built.
        spec: of the data.
        source: of data: teaches and calibrates.
        config: stages and seed.
        shelf: where trained networks are kept, and what students of an earlier search learned; None: nowhere.
        deadline: `time.monotonic()` after which training raises TimeUpError; None: never.
        say: takes a line of progress.
    """

    def __init__(
        self,
        teacher: WholeModel,
        task: Task,
        spec: Spec,
        source: Source,
        config: Config,
        *,
        shelf: Shelf | None = None,
        deadline: float | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self._teacher = copy.deepcopy(teacher).eval()
        self.spec, self._task, self._source, self._config = spec, task, source, config
        self._shelf, self._deadline, self._say = shelf, deadline, say
        self._earlier = shelf.before() if shelf is not None else {}
        self._short: dict[Architecture, nn.Module] = {}
        self._networks: dict[tuple[Architecture, FormName], nn.Module] = {}
        self._graphs: dict[Architecture, bytes] = {}
        self.seconds: dict[str, float] = {}  # that each training took, by its name
        self.lessons: dict[str, float] = {}  # that a whole one would take, where a gentle one was enough

    def build(self, recipe: Recipe) -> bytes:
        """The candidate as ONNX, trained as far as its form needs.

        Raises:
            CompressionError: a stage could not do its work; another candidate may still succeed.
            TimeUpError: the deadline has passed.
        """
        kept = self._shelf.graph(recipe.name) if self._shelf is not None else None
        if kept is not None:
            return kept
        graph = self._built(recipe)
        if self._shelf is not None:
            self._shelf.keep_graph(recipe.name, graph)
        return graph

    def _built(self, recipe: Recipe) -> bytes:
        if recipe.trained:
            return self.exported(self.network(recipe.architecture, recipe.form))
        graph = self.exact(recipe.architecture)
        return graph if recipe.form == "fp32" else self._source.calibrate(graph)

    def exact(self, architecture: Architecture) -> bytes:
        """The trained network as ONNX in float32.

        Raises:
            CompressionError, TimeUpError: as `build`.
        """
        if architecture not in self._graphs:
            self._graphs[architecture] = self.exported(self.network(architecture))
        return self._graphs[architecture]

    def built_untrained(self, recipe: Recipe) -> bytes:
        """The recipe as ONNX without any training: its size and speed, and answers that mean nothing.

        Raises:
            CompressionError: it cannot be built.
        """
        network = self.untrained(recipe.architecture)
        if recipe.form in _BITS:
            return self.exported(frozen(prepared(network, _BITS[recipe.form])))
        graph = self.exported(network)
        return graph if recipe.form == "fp32" else self._source.calibrate(graph)

    def network(self, architecture: Architecture, form: FormName = "fp32") -> nn.Module:
        """The trained network, whose weights lie on the form's grid.

        Raises:
            CompressionError, TimeUpError: as `build`.
        """
        key = (architecture, form)
        if key not in self._networks:
            if form in _BITS:
                self._networks[key] = self._on_grid(architecture, form)
            else:
                self._networks[key] = self._trained(architecture)
        return self._networks[key]

    def is_warm(self, architecture: Architecture) -> bool:
        """Whether an earlier search has taught this student: it goes on from there."""
        before = self._earlier.get(architecture.name) if architecture.student else None
        return before is not None and _shapes(before) == _shapes(arrays_of(self._new(architecture)))

    def tried_out(self, architecture: Architecture, share: float) -> nn.Module:
        """The network after a short training, from which the whole one goes on.

        A student that an earlier search has taught learns no longer than that: it is trained whole.

        Args:
            architecture: of a student.
            share: of the epochs of the whole training.

        Raises:
            CompressionError, TimeUpError: as `build`.
        """
        if self.is_warm(architecture):
            return self.network(architecture)
        settings = self._config.compress.distil
        short = replace(settings, epochs=max(round(share * settings.epochs), 1))
        self._short[architecture] = self._learned(
            f"{architecture.name}.short", architecture.student, self._first(architecture), short
        )
        return self._short[architecture]

    def parameters(self, architecture: Architecture) -> int:
        """Number of parameters of the network, trained or not.

        Raises:
            CompressionError: it cannot be built.
        """
        known = self._networks.get((architecture, "fp32"))
        network = known if known is not None else self.untrained(architecture)
        return sum(parameter.numel() for parameter in network.parameters())

    def untrained(self, architecture: Architecture) -> nn.Module:
        """A network of this architecture that knows nothing, or of the global model what pruning leaves.

        Raises:
            CompressionError: it cannot be built.
        """
        if architecture.student:
            return self._first(architecture)
        if architecture.cut is None:
            return self._teacher.network
        cut, settings, seed = architecture.cut, self._config.compress.prune, self._config.seed
        if cut.kind == "unstructured":
            return sparsify(self._teacher.network, cut.share, settings, seed=seed).network.eval()
        example = preprocessed(self._teacher.preprocess, self.spec.zeros(2))
        return prune(self._teacher.network, example, cut.share, settings, seed=seed).network.eval()

    def exported(self, network: nn.Module) -> bytes:
        """A network behind the pre-processing, as ONNX.

        Raises:
            CompressionError: as `export`.
        """
        return export(WholeModel(self._teacher.preprocess, network), self.spec)

    def _trained(self, architecture: Architecture) -> nn.Module:
        if not architecture.learns:
            return self._teacher.network
        if not architecture.student:
            return self._remembered(architecture.name, architecture, lambda: self._pruned(architecture))
        first = self._short.get(architecture) or self._first(architecture)
        if self.is_warm(architecture):
            return self._remembered(architecture.name, first, lambda: self._taught_on(architecture, first))
        return self._learned(architecture.name, architecture.student, first, self._config.compress.distil)

    def _taught_on(self, architecture: Architecture, first: nn.Module) -> nn.Module:
        """A student that knows what the last search's global model answered."""
        began, settings = time.monotonic(), self._gently()
        gentle = self._taught(architecture.student, first, settings)
        whole = self._config.compress.distil
        self.lessons[architecture.name] = (time.monotonic() - began) * whole.epochs / settings.epochs
        before, after = (self._source.selection_of(each) for each in (first, gentle))
        if before is None or after is None:
            return gentle
        rise, behind = after.accuracy - before.accuracy, after.teacher_accuracy - after.accuracy
        if rise < _MOVED and behind < _FAR:
            return gentle
        try:
            bold = self._taught(architecture.student, first, whole)
        except CompressionError as error:  # the time is up, or its loss ceased to be finite: nothing is lost
            self._say(f"compress: {architecture.name} is taught gently alone: {error}")
            return gentle
        counts = self._source.selection_of(bold)
        return bold if counts is not None and counts.accuracy >= after.accuracy + _MOVED else gentle

    def _gently(self) -> Distil:
        settings = self._config.compress.distil
        epochs = max(round(_WARM_EPOCHS * settings.epochs), 1)
        return replace(settings, epochs=epochs, learning_rate=_GENTLE * settings.learning_rate)

    def _taught(self, student: str, network: nn.Module, settings: Distil) -> nn.Module:
        return self._source.teach(
            network, settings, model=STUDENT + student, seed=self._config.seed, deadline=self._deadline
        )

    def _learned(self, name: str, student: str, network: nn.Module, settings: Distil) -> nn.Module:
        return self._remembered(name, network, lambda: self._taught(student, network, settings))

    def _on_grid(self, architecture: Architecture, form: FormName) -> nn.Module:
        settings = self._config.compress
        student = prepared(self.network(architecture), _BITS[form])
        if not self._source.trains_grids:
            if form not in _ROUNDED:
                raise CompressionError(f"{form}: so few values must be trained, and clients cannot")
            return frozen(student)
        learning = replace(
            settings.distil, epochs=settings.grid.epochs, learning_rate=settings.grid.learning_rate
        )
        began = time.monotonic()
        taught = self._source.teach(
            student, learning, model="", seed=self._config.seed, deadline=self._deadline
        )
        self.seconds[Recipe(architecture, form).name] = time.monotonic() - began
        return frozen(taught)

    def _pruned(self, architecture: Architecture) -> nn.Module:
        if architecture.cut is None:
            raise CompressionError(f"{architecture.name}: nothing is pruned")
        return self._source.pruned(
            self._teacher.network,
            architecture.cut,
            self._config.compress,
            seed=self._config.seed,
            deadline=self._deadline,
        )

    def _remembered(
        self, name: str, like: nn.Module | Architecture, make: Callable[[], nn.Module]
    ) -> nn.Module:
        """What is on the shelf under this name, else made and put there."""
        if (kept := self._kept(name, like)) is not None:
            return kept
        began = time.monotonic()
        made = make()
        self.seconds[name] = time.monotonic() - began
        if self._shelf is not None:
            self._shelf.keep_network(name, arrays_of(made), self.seconds[name])
        return made

    def _kept(self, name: str, like: nn.Module | Architecture) -> nn.Module | None:
        found = self._shelf.network(name) if self._shelf is not None else None
        if found is None:
            return None
        network = copy.deepcopy(self.untrained(like) if isinstance(like, Architecture) else like)
        arrays, seconds = found
        if _shapes(arrays) != _shapes(arrays_of(network)):
            return None
        load_arrays(network, arrays)
        self.seconds[name] = seconds
        self._say(f"compress: {name} was made before")
        return network.eval()

    def _first(self, architecture: Architecture) -> nn.Module:
        """A student that has not learned yet: its weights come from the seed, or from the last release's."""
        network = self._new(architecture)
        if self.is_warm(architecture):
            load_arrays(network, self._earlier[architecture.name])
        return network.eval()

    def _new(self, architecture: Architecture) -> nn.Module:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._config.seed)
                return self._task.student(architecture.student)(self.spec)
        except FedgeError as error:
            raise CompressionError(f"student {architecture.student!r} cannot be built: {error}") from error


def _shapes(arrays: NamedArrays) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in arrays.items()}
