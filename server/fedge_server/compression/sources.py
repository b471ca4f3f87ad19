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

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedge.artefact import unpack
from fedge.config import Config, DataKind, Distil
from fedge.counts import Counts
from fedge.dataset import Examples, stratified
from fedge.errors import CompressionError, ConfigError
from fedge.inference import CompactModel, Float32
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge.statistics import Moments
from fedge.task import Task
from fedge_server.compression.clients import Clients, Fleet
from fedge_server.compression.distil import distil, preprocessed
from fedge_server.compression.gate import Evidence, evidence_of, score
from fedge_server.compression.quantise import MAX_CALIBRATION, quantise
from fedge_server.data import ServerData

SELECTION_SHARE = 0.3  # of the proxy data: orders the candidates, trains nothing

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

    def describe(self) -> str:
        """What comes from where, in a line for the outcome and the report."""
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

    def calibrate(self, graph: bytes) -> bytes:
        """An exported graph in int8.

        Raises:
            CompressionError: it cannot be quantised, or nothing is known of the ranges.
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

    def evidence(self, wire: bytes, installed_bytes: int) -> Evidence:
        """What the gate decides from, on data that nothing else has looked at.

        Raises:
            CompressionError: nobody could tell.
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
    if config.compress.data in ("clients", "unlabelled"):
        raise ConfigError(f"compress.data = {config.compress.data!r}: the search does not ask it yet")
    kind_of(config, proxy, clients=True)


def source_of(
    config: Config,
    task: Task,
    data: ServerData,
    model: WholeModel,
    *,
    moments: Moments | None = None,
    fleet: Fleet | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """The source of a run's compression.

    Args:
        config: of the run.
        task: of the run.
        data: the server's.
        model: the global one.
        moments: by which its inputs are standardised; for clients, who are told them.
        fleet: how clients can be asked; None: they cannot.
        say: takes a line of progress.

    Raises:
        ConfigError: `compress.data` names what is not there.
    """
    kind = kind_of(config, data.proxy, clients=fleet is not None)
    if kind == "clients":
        assert fleet is not None  # noqa: S101 - `kind_of` has looked
        return Clients(config, task, data, fleet, model, moments, say)
    return OnServer.of(kind, config, data, model)


@dataclass(frozen=True, slots=True)
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

    @classmethod
    def of(cls, kind: DataKind, config: Config, data: ServerData, model: WholeModel) -> OnServer:
        """Divide the proxy data; of kind "none" there are none."""
        proxy = data.proxy if kind != "none" else data.proxy.take(np.arange(0))
        training, apart = parts(proxy, config.seed)
        answers = answers_of(model.eval(), data.gate)
        return cls(kind, model, data.spec, training, apart, data.gate, config.seed, answers)

    @property
    def learns(self) -> bool:
        """Whether there are proxy data."""
        return len(self.training) > 0

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
        if not self.learns:
            raise CompressionError("distil: there is no data to learn from; see compress.data")
        x, y = preprocessed(self.model.preprocess, self.training.x), torch.from_numpy(self.training.y)
        if self.kind == "unlabelled":
            settings = replace(settings, mode="soft")
        known = None if self.kind == "unlabelled" else y
        return distil(self.model.network, student, x, known, settings, seed=seed, deadline=deadline)

    def calibrate(self, graph: bytes) -> bytes:
        """By the ranges on some of the proxy data."""
        order = np.random.default_rng(self.seed).permutation(len(self.training))
        return quantise(graph, self.training.x[order[:MAX_CALIBRATION]])

    def selection(self, wire: bytes, installed_bytes: int) -> Counts | None:
        """On the proxy data set apart; without labels what the teacher answers there is taken for true."""
        if not len(self.apart):
            return None
        answers = _run(CompactModel(unpack(wire, installed_bytes), self.spec), self.apart.x)
        teacher = answers_of(self.model, self.apart)
        truth = self.apart.y if self.kind == "labelled" else teacher.argmax(axis=1)
        return evidence_of(answers, teacher, truth, self.spec.classes).counts

    def evidence(self, wire: bytes, installed_bytes: int) -> Evidence:
        """On the gate's data."""
        probabilities = score(wire, installed_bytes, self.spec, self.gate.x)
        return evidence_of(probabilities, self.answers, self.gate.y, self.spec.classes)


def parts(proxy: Examples, seed: int) -> tuple[Examples, Examples]:
    """The proxy data as (training and calibration, selection), stratified by class; both or neither empty."""
    rng = np.random.default_rng([seed, 0x5E1EC7])
    selected, rest = stratified(proxy.y, SELECTION_SHARE, rng)
    if len(selected) == 0 or len(rest) < 2:
        return proxy.take(selected[:0]), proxy.take(selected[:0])
    return proxy.take(rest), proxy.take(selected)


@torch.no_grad()
def answers_of(model: WholeModel, examples: Examples) -> Float32:
    """A global model's own probabilities (N, C), by torch; it must be in evaluation mode."""
    chunks = [
        torch.softmax(model(torch.from_numpy(examples.x[i : i + _BATCH])), dim=1).numpy()
        for i in range(0, len(examples), _BATCH)
    ]
    return np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)


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
