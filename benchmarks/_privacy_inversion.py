"""Gradient inversion of fedge's real client on digits, against what the server sees under each protection.

Scores are correlations of reconstruction and victim, over victims that each hold one digit or a batch of
them. Beside every score stands its control: the better of the mean image of all digits, and the same attack
on a view in which the victim has no part. A view protects where its score is no more than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from _harness import Row

from fedge.dataset import Dataset
from fedge.statistics import Moments
from fedge.task import Source
from fedge.tasks.digits import TASK
from fedge_simulations.attacks import (
    Federation,
    Matching,
    analytic,
    candidates,
    correlation,
    inferred_label,
    matching,
    psnr,
    views,
)
from fedge_simulations.attacks.inversion import Gradients, leading

Array = npt.NDArray[np.floating]
Image = Callable[[Gradients, Array, int], Array]
"""Gradients, the victim (only the attack "best unit" looks at it), and its number, to an image."""

PEAK = 16.0  # of a digit's pixels
COHORT = 100


@dataclass(frozen=True, slots=True)
class View:
    """What the server sees of victim number j, and the same without the victim."""

    name: str
    protected: bool  # claims to protect: its score must be no better than its control
    seen: Callable[[int], Gradients]
    without: Callable[[int], Gradients]


def inversion(*, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """The claim and the rows: every view under every attack that fits it."""
    data = TASK.read(Source())
    count = 20 if quick else 40
    order = np.random.default_rng(0).permutation(len(data))
    victims, others = order[:count], order[count:]
    dense = Setting.of(data, victims, others, "mlp", examples=1)
    conv = Setting.of(data, victims[: count // 4 if quick else count // 2], others, "cnn", examples=1)
    batches = Setting.of(data, victims, others, "mlp", examples=8)
    rows: list[dict[str, str | float]] = []
    for view in dense.views():
        rows += [dense.row(view, name, attack) for name, attack in dense.analytic_attacks().items()]
    for view in batches.views():
        rows.append(batches.row(view, "best unit", _best_unit(batches)))
    for view in conv.views():
        if view.name in _BY_OPTIMISATION:
            rows.append(conv.row(view, "gradient matching", _by_matching(conv, steps=300)))
    worst = max((row for row in rows if row["claims to protect"] == "yes"), key=_ratio)
    print(
        f"best protected view over its control: {worst['view']}, {worst['attack']}, "
        f"{worst['model, examples']}"
    )
    return {"inversion_over_control": _ratio(worst)}, list(rows)


_BY_OPTIMISATION = ("plain", "int8", "clip 1, noise 0.01", "clip 1, noise 1", "masked")


def _ratio(row: Mapping[str, str | float]) -> float:
    return float(row["over control"])


@dataclass(frozen=True, slots=True)
class Setting:
    """Victims of one model and size; the victim's first example is what an attack is after."""

    data: Dataset
    federation: Federation
    fedsgd: Federation
    longer: Federation  # five local steps
    shares: list[npt.NDArray[np.integer]]  # positions of each victim's examples
    around: list[Gradients]  # of COHORT other clients of the same size

    @classmethod
    def of(
        cls,
        data: Dataset,
        victims: npt.NDArray[np.integer],
        others: npt.NDArray[np.integer],
        model: str,
        *,
        examples: int,
    ) -> Setting:
        """Victims and a cohort around them, each with so many examples of its own."""
        moments = Moments.of(data.x, data.spec)
        plain = Federation.of(TASK, data.spec, model=model, moments=moments)
        fedsgd = Federation.of(TASK, data.spec, model=model, moments=moments, update="gradient")
        longer = Federation.of(TASK, data.spec, model=model, moments=moments, epochs=5)
        fill = others[: len(victims) * (examples - 1)].reshape(len(victims), -1)
        rest = others[fill.size :][: COHORT * examples].reshape(COHORT, examples)
        shares = [np.concatenate([[victim], more]) for victim, more in zip(victims, fill, strict=True)]
        made = cls(data, plain, fedsgd, longer, shares, [])
        return cls(data, plain, fedsgd, longer, shares, [made.of_share(plain, share) for share in rest])

    def of_share(self, federation: Federation, share: npt.NDArray[np.integer]) -> Gradients:
        """What a server reads off the answer of a client that holds these examples."""
        return federation.gradients_of(federation.update_of(self.data.examples.take(share)))

    def victim(self, j: int) -> Array:
        """(8, 8) the raw example that the attack is after."""
        return np.asarray(self.data.x[self.shares[j][0]], np.float64)

    def views(self) -> list[View]:
        """From none to the strongest protection."""
        own = [self.of_share(self.federation, share) for share in self.shares]
        other = [self.around[j % COHORT] for j in range(len(own))]

        def view(name: str, protected: bool, seen: Callable[[Gradients, int], Gradients]) -> View:
            return View(name, protected, lambda j: seen(own[j], j), lambda j: seen(other[j], COHORT + j))

        def mixed(clients: int) -> Callable[[Gradients, int], Gradients]:
            return lambda mine, j: views.summed([mine, *self.around[-clients + 1 :]])

        def noise(sigma: float) -> Callable[[Gradients, int], Gradients]:
            return lambda mine, j: views.noised(mine, clip=1.0, sigma=sigma, seed=j)

        def through(federation: Federation) -> Callable[[int], Gradients]:
            return lambda j: self.of_share(federation, self.shares[j])

        return [
            view("plain", False, lambda mine, j: mine),
            View("plain, fedsgd", False, through(self.fedsgd), lambda j: other[j]),
            View("plain, 5 local steps", False, through(self.longer), lambda j: other[j]),
            view("int8", False, lambda mine, j: views.int8(mine)),
            view("clip 1, noise 0.01", False, noise(0.01)),
            view("clip 1, noise 0.1", False, noise(0.1)),
            view("clip 1, noise 1", True, noise(1.0)),
            view("sum of 10", False, mixed(10)),
            view(f"sum of {COHORT}", False, mixed(COHORT)),
            view("masked", True, lambda mine, j: views.masked(mine, seed=j)),
        ]

    def analytic_attacks(self) -> dict[str, Image]:
        """On a dense first layer."""
        return {
            "all units": lambda g, _, __: self._raw(analytic(g["1.weight"], g["1.bias"])),
            "first direction": lambda g, _, __: self._raw(_upright(leading(g["1.weight"]), g)),
            "best unit": _best_unit(self),
        }

    def _raw(self, x: Array) -> Array:
        return np.asarray(self.federation.raw(x.reshape(1, 1, 8, 8))).reshape(8, 8)

    def row(self, view: View, attack_name: str, attack: Image) -> dict[str, str | float]:
        """Mean score and spread over the victims, and the control's."""
        seen = [attack(view.seen(j), self.victim(j), j) for j in range(len(self.shares))]
        without = [attack(view.without(j), self.victim(j), j) for j in range(len(self.shares))]
        targets = [self.victim(j) for j in range(len(self.shares))]
        scores = [correlation(a, b) for a, b in zip(seen, targets, strict=True)]
        unrelated = statistics.mean(correlation(a, b) for a, b in zip(without, targets, strict=True))
        mean_image = statistics.mean(correlation(self.data.x.mean(0), b) for b in targets)
        control = max(unrelated, mean_image)
        return {
            "view": view.name,
            "claims to protect": "yes" if view.protected else "no",
            "model, examples": f"{self.federation.instructions.model}, {len(self.shares[0])}",
            "attack": attack_name,
            "victims": len(scores),
            "correlation": statistics.mean(scores),
            "spread": statistics.stdev(scores),
            "mean image": mean_image,
            "without the victim": unrelated,
            "over control": statistics.mean(scores) / control,
            "PSNR dB": statistics.median(psnr(a, b, PEAK) for a, b in zip(seen, targets, strict=True)),
        }


def _upright(direction: Array, gradients: Gradients) -> Array:
    """A direction has no sign: the one that agrees with the bias's gradients is taken."""
    bias = gradients["1.bias"]
    sign = float(np.sign(bias @ (gradients["1.weight"] @ direction))) or 1.0
    scale = np.sqrt(len(direction))  # a standardised input has about this length
    return np.asarray(sign * scale * direction)


def _best_unit(setting: Setting) -> Image:
    """Whoever knew the victim would pick this candidate: an upper bound of what the units show."""

    def attack(gradients: Gradients, victim: Array, _: int) -> Array:
        found = candidates(gradients["1.weight"], gradients["1.bias"])
        raw = setting.federation.raw(found.reshape(-1, 1, 8, 8)).reshape(-1, 8, 8)
        return np.asarray(max(raw, key=lambda image: correlation(image, victim)))

    return attack


def _by_matching(setting: Setting, *, steps: int) -> Image:
    network, moments = setting.federation.network(), setting.federation.instructions.moments
    assert moments is not None
    low, high = (float((value - moments.mean[0]) / moments.std[0]) for value in (0.0, PEAK))
    settings = Matching(steps=steps, bounds=(low, high))
    last = list(setting.federation.state)[-1]

    def attack(gradients: Gradients, _: Array, number: int) -> Array:
        label = inferred_label(gradients[last])
        found = matching(network, gradients, [label], (1, 8, 8), settings=settings, seed=number)
        return np.asarray(setting.federation.raw(found)).reshape(8, 8)

    return attack
