"""Where compression learns about data: the server's own, with labels or without, the clients', or nowhere.

The search asks a `Source` and does not know which one it is. What is used is chosen by what there is
(`kind_of`), said in the run's outcome, and never made up: without data nothing is distilled.

| kind | a student learns from | ranges come from | candidates are ordered by | the gate counts on |
|---|---|---|---|---|
| labelled | proxy data: answers, labels | proxy data | accuracy on proxy data set apart | the gate's data |
| unlabelled | proxy data: answers alone | proxy data | agreement with the teacher there | the gate's data |
| clients | their data, in rounds | their data | accuracy on what they keep back | the rest of that |
| none | nothing | nothing | nothing | the gate's data |
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedge.artefact import unpack
from fedge.config import Calibration, Compress, Config, DataKind, Distil
from fedge.counts import Counts
from fedge.dataset import Examples, stratified
from fedge.errors import CompressionError, ConfigError
from fedge.inference import CompactModel, Float32
from fedge.learning.whole import WholeModel
from fedge.routing import Routing
from fedge.spec import Spec
from fedge_server.compression.distil import preprocessed
from fedge_server.compression.gate import Evidence, evidence_of, score
from fedge_server.compression.layer_inputs import MAX_EXAMPLES, Inputs, inputs_of
from fedge_server.compression.material import Material
from fedge_server.compression.quantise import MAX_CALIBRATION, quantise
from fedge_server.compression.recovery import Cut, pruned_and_recovered
from fedge_server.compression.routing import routing_of
from fedge_server.data import ServerData
from fedge_server.rounds.scoring import probabilities_of

SELECTION_SHARE = 0.3  # of the proxy data: orders the candidates, trains nothing
MOST_SELECTION = 5000  # examples that do

_BATCH = 256


class Source(Protocol):
    """Whatever knows data, for as long as one global model is made small."""

    @property
    def kind(self) -> str:
        """Which of `fedge.config.DataKind` it is."""
        ...

    @property
    def learns(self) -> bool:
        """Whether `teach` and `calibrate` can do anything; else only the unchanged model is a candidate."""
        ...

    @property
    def trains_grids(self) -> bool:
        """Whether `teach` can train weights of few values; else these are rounded from trained ones."""
        ...

    @property
    def gate_examples(self) -> int | None:
        """That the gate will count on; None: not known before."""
        ...

    def describe(self) -> str:
        """What comes from where, in a line for the outcome and the report."""
        ...

    def identity(self) -> bytes:
        """What the data are: another value where students would learn something else."""
        ...

    def make_ready(self) -> None:
        """Do what all teaching shares, so that no student's time is charged with it."""
        ...

    def teach(
        self,
        student: nn.Module,
        settings: Distil,
        *,
        model: str,
        seed: int,
        deadline: float | None = None,
    ) -> nn.Module:
        """A copy of the student that has learned to answer as the global model does.

        Args:
            student: its weights are the starting point.
            settings: how.
            model: its architecture by a name that others know, such as 'student:small'; empty: it has none.
            seed: of the run.
            deadline: a value of `time.monotonic` after which no further step or round begins; None: none.

        Raises:
            CompressionError: it cannot learn here; another candidate may.
            TimeUpError: the deadline has passed.
        """
        ...

    def pruned(
        self, network: nn.Module, cut: Cut, settings: Compress, *, seed: int, deadline: float | None = None
    ) -> nn.Module:
        """What is left of the global model's network after pruning and recovery; see `recovery`.

        Raises:
            CompressionError: it cannot be pruned, or cannot learn here.
            TimeUpError: the deadline has passed.
        """
        ...

    def selection_of(self, network: nn.Module) -> Counts | None:
        """What a network that is no candidate yet gets right; None: nothing is known, or it would be dear.

        Args:
            network: from pre-processed inputs to logits.
        """
        ...

    def calibrate(self, graph: bytes) -> bytes:
        """An exported graph in int8.

        Raises:
            CompressionError: it cannot be quantised, or nothing is known of the ranges.
        """
        ...

    def inputs_of(self, graph: bytes) -> tuple[Inputs | None, ...]:
        """What goes into the layers of an exported graph, as `layer_inputs.inputs_of`; empty: not known.

        Raises:
            CompressionError: the graph cannot be run.
        """
        ...

    def selection(self, wire: bytes, installed_bytes: int) -> Counts | None:
        """What candidates are ordered by, their `accuracy`; None: nothing is known. No data of the gate.

        Args:
            wire: as it ships.
            installed_bytes: that it unpacks to.

        Raises:
            CompressionError: nobody could tell.
        """
        ...

    def probabilities(self, graph: bytes) -> Float32 | None:
        """What a graph answers (N, C) to the selection data; None: nothing is known of these.

        Raises:
            CompressionError: the graph cannot be run.
        """
        ...

    def evidence(self, wire: bytes, installed_bytes: int) -> Evidence:
        """What the gate decides from, on data that nothing else has looked at.

        Raises:
            CompressionError: nobody could tell.
        """
        ...

    def routing(self, wire: bytes, installed_bytes: int, among: int) -> Routing:
        """When a device should ask the cloud, or why that is not known. No data of the gate.

        Args:
            wire: as it ships.
            installed_bytes: that it unpacks to.
            among: recipes that it was chosen from.
        """
        ...


def kind_of(config: Config, proxy: Examples, *, clients: bool) -> DataKind:
    """The source that a run's compression has, by what there is.

    Args:
        config: of the run; `compress.data` may name it.
        proxy: the server's own data.
        clients: whether the run's clients can be asked.

    Raises:
        ConfigError: what is named is not there.
    """
    named, own = config.compress.data, len(parts(proxy, config.seed)[0]) > 0
    if named in ("labelled", "unlabelled") and not own:
        raise ConfigError(
            f"compress.data = {named!r}: {len(proxy)} examples of proxy data on the server are too few; "
            "raise evaluate.proxy_fraction, or take 'clients'"
        )
    why_not = _why_not_clients(config, clients=clients)
    if named == "clients" and why_not:
        raise ConfigError(f"compress.data = 'clients': {why_not}")
    if named != "auto":
        return named
    return "labelled" if own else "none" if why_not else "clients"


def check_source(config: Config, proxy: Examples) -> None:
    """Find out before a run whether its compression will have the source that is named.

    Args:
        config: of the run.
        proxy: the server's own data.

    Raises:
        ConfigError: it will not.
    """
    kind_of(config, proxy, clients=True)


@dataclass(slots=True)
class OnServer:
    """The server's own data, or none."""

    kind: DataKind
    model: WholeModel  # the global one, in evaluation mode
    spec: Spec
    training: Examples  # of the proxy data: what students learn from, and ranges come from
    apart: Examples  # likewise: what candidates are ordered by
    gate: Examples
    seed: int
    answers: Float32  # of the model to the gate's data
    settings: Distil
    calibration: Calibration
    trains_grids: bool = True
    _material: Material | None = field(default=None, init=False)
    _apart: Float32 | None = field(default=None, init=False)  # the model's answers to what is set apart

    @classmethod
    def of(cls, kind: DataKind, config: Config, data: ServerData, model: WholeModel) -> OnServer:
        """Divide the proxy data; of kind "none" there are none."""
        proxy = data.proxy if kind != "none" else data.proxy.take(np.arange(0))
        training, apart = parts(proxy, config.seed)
        answers = probabilities_of(model.eval(), data.gate)
        distil, routing = config.compress.distil, config.compress.routing
        return cls(kind, model, data.spec, training, apart, data.gate, config.seed, answers, distil, routing)

    @property
    def gate_examples(self) -> int:
        """Of the server's own."""
        return len(self.gate)

    @property
    def learns(self) -> bool:
        """Whether there are proxy data."""
        return len(self.training) > 0

    def make_ready(self) -> None:
        """Let the teacher answer what it is asked but once."""
        self._taught()

    def identity(self) -> bytes:
        """Digest of the data that students learn from."""
        sha = hashlib.sha256(f"{self.kind} {self.training.x.shape} {self.training.x.dtype}".encode())
        sha.update(np.ascontiguousarray(self.training.x).tobytes() + self.training.y.tobytes())
        return sha.digest()

    def describe(self) -> str:
        """In a line."""
        if not self.learns:
            return "no data to learn from, so only the unchanged global model (fp32) is a candidate"
        labels = "with" if self.kind == "labelled" else "without"
        return f"students and ranges come from {len(self.training)} proxy examples {labels} labels"

    def teach(
        self,
        student: nn.Module,
        settings: Distil,
        *,
        model: str,
        seed: int,
        deadline: float | None = None,
    ) -> nn.Module:
        """Distil on the proxy data; without labels from the teacher's answers alone."""
        return self._taught().teach(student, self._fitting(settings), seed=seed, deadline=deadline)

    def pruned(
        self, network: nn.Module, cut: Cut, settings: Compress, *, seed: int, deadline: float | None = None
    ) -> nn.Module:
        """Recovered on the proxy data."""
        taught, fitting = self._taught(), replace(settings, distil=self._fitting(settings.distil))
        return pruned_and_recovered(
            network, taught.x, taught.y, cut, fitting, seed=seed, deadline=deadline
        ).network

    def selection_of(self, network: nn.Module) -> Counts | None:
        """On the proxy data set apart, by torch."""
        if not len(self.apart):
            return None
        whole = WholeModel(self.model.preprocess, network.eval())
        return self._counts(probabilities_of(whole, self.apart))

    def _taught(self) -> Material:
        if not self.learns:
            raise CompressionError("distil: there is no data to learn from; see compress.data")
        if self._material is None:
            x = preprocessed(self.model.preprocess, self.training.x)
            y = None if self.kind == "unlabelled" else torch.from_numpy(self.training.y)
            settings = self._fitting(self.settings)
            self._material = Material.of(self.model.network, x, y, settings, seed=self.seed)
        return self._material

    def _fitting(self, settings: Distil) -> Distil:
        """Without labels only the teacher's answers are learned."""
        return replace(settings, mode="soft") if self.kind == "unlabelled" else settings

    def calibrate(self, graph: bytes) -> bytes:
        """By the ranges on some of the proxy data."""
        order = np.random.default_rng(self.seed).permutation(len(self.training))
        return quantise(graph, self.training.x[order[:MAX_CALIBRATION]])

    def inputs_of(self, graph: bytes) -> tuple[Inputs | None, ...]:
        """On the proxy data that students learn from."""
        if not self.learns:
            return ()
        order = np.random.default_rng(self.seed).permutation(len(self.training))
        return inputs_of(graph, self.training.x[order[:MAX_EXAMPLES]])

    def selection(self, wire: bytes, installed_bytes: int) -> Counts | None:
        """On the proxy data set apart; without labels what the teacher answers there is taken for true."""
        answers = self.probabilities(unpack(wire, installed_bytes))
        return None if answers is None else self._counts(answers)

    def probabilities(self, graph: bytes) -> Float32 | None:
        """On the proxy data set apart."""
        return _run(CompactModel(graph, self.spec), self.apart.x) if len(self.apart) else None

    def _counts(self, answers: Float32) -> Counts:
        teacher, truth = self._known()
        return evidence_of(answers, teacher, truth, self.spec.classes).counts

    def _known(self) -> tuple[Float32, npt.NDArray[np.int64]]:
        """The model's answers to the data set apart, and what is taken for true there."""
        if self._apart is None:
            self._apart = probabilities_of(self.model, self.apart)
        return self._apart, self.apart.y if self.kind == "labelled" else self._apart.argmax(axis=1)

    def routing(self, wire: bytes, installed_bytes: int, among: int) -> Routing:
        """Calibrated on the proxy data set apart."""
        answers = self.probabilities(unpack(wire, installed_bytes))
        if answers is None:
            return Routing(self.calibration.doubt, reason="the server has no proxy data to calibrate on")
        teacher, truth = self._known()
        return routing_of(
            answers,
            teacher,
            truth,
            self.calibration,
            among=among,
            labelled=self.kind == "labelled",
        )

    def evidence(self, wire: bytes, installed_bytes: int) -> Evidence:
        """On the gate's data."""
        probabilities = score(wire, installed_bytes, self.spec, self.gate.x)
        return evidence_of(probabilities, self.answers, self.gate.y, self.spec.classes)


def parts(proxy: Examples, seed: int) -> tuple[Examples, Examples]:
    """The proxy data as (training and calibration, selection), stratified by class; both or neither empty."""
    rng = np.random.default_rng([seed, 0x5E1EC7])
    share = min(SELECTION_SHARE, MOST_SELECTION / max(len(proxy), 1))
    selected, rest = stratified(proxy.y, share, rng)
    if len(selected) == 0 or len(rest) < 2:
        return proxy.take(selected[:0]), proxy.take(selected[:0])
    return proxy.take(rest), proxy.take(selected)


def _run(model: CompactModel, x: npt.NDArray[np.generic]) -> Float32:
    return np.concatenate([model.run(x[i : i + _BATCH])[1] for i in range(0, len(x), _BATCH)])


def _why_not_clients(config: Config, *, clients: bool) -> str:
    """Why the clients cannot be the source, and what to do; empty: they can."""
    privacy = config.privacy
    for wrong, why in (
        (not clients, "there is no client to be asked here; compress within the run, or take proxy data"),
        (
            config.evaluate.client_holdout == 0,
            (
                "clients must keep examples back before they train, to judge variants on; set "
                "evaluate.client_holdout"
            ),
        ),
        (
            privacy.mechanism != "none" or privacy.secure_aggregation,
            (
                "ranges and counts of single clients would be sent as they are, which neither a "
                "privacy.mechanism nor privacy.secure_aggregation covers; take proxy data"
            ),
        ),
    ):
        if wrong:
            return why
    return ""
