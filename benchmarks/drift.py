"""How often drift is seen where there is none, and how soon where there is: on real people and real images.

    people   uji_har.npz: 8 people teach a model (logistic regression on the features), 15 others are
             devices; a window holds 3 of a person's recordings, drawn anew, so that answers within it depend
             on each other. Changes: the sensor is turned (its axes change places), for all or a third of
             the people; a watch instead of the phone.
    images   fashion_mnist.npz: 20 devices with classes of their own (Dirichlet .5), windows of 60 images.
             Changes: turned by a quarter, by 15 and by 3 degrees, for some; darker; other shares of the
             classes; with noise for privacy in the counts (windows of 500); new devices with darker images.

Beside the watch, all at a stated 5 % for 100 periods: what looks right and is not, chi-square tests of all
answers pooled, against the reference and against the first periods, with Bonferroni's correction over
features and periods; and the customary PSI > 0.2, which states nothing. The unit of those is the answer, of
the watch the device.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from _drift_data import Watched, World, images, people
from _harness import Row, machine, options, publish
from scipy.stats import chi2

from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge.telemetry.window import Window
from fedge_client.telemetry.collector import Answering, Collector
from fedge_client.telemetry.settings import Settings as Collecting
from fedge_server.drift.scores import Shapes
from fedge_server.drift.stability import index
from fedge_server.drift.watch import Settings, Track, Watch, observe
from fedge_server.page import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL, PERIODS, BASELINE = 0.05, 100, 5
BEGINS, AFTER = 30, 30  # periods before a change, and after it
SETTINGS: Final = Settings(false_alarms=LEVEL, periods=PERIODS, baseline=BASELINE)
Floats = npt.NDArray[np.float64]
PARTS: Final = ("quiet", "changes", "cost")
NAMES: Final = ("watch", "pooled to reference", "pooled to baseline", "PSI > 0.2")


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of run."""

    name: str
    world: World
    changed: str = ""  # condition from BEGINS on; empty: nothing changes
    share: float = 1.0  # of the devices that change
    answers: int = 0  # of a window; 0: the world's
    epsilon: float = 0.0  # of noise in the counts; 0: none


@dataclass(frozen=True, slots=True)
class Found:
    """When each way raised its alarm in one run, and the evidence of the watch by period."""

    alarms: dict[str, int]
    evidence: list[float]


def run(case: Case, seed: int, periods: int) -> Found:
    """One fleet over so many periods."""
    world, rng = case.world, np.random.default_rng(seed)
    fleet = Watched(world, SETTINGS)
    alarms: dict[str, int] = {}
    evidence: list[float] = []
    baseline: Shapes | None = None
    for period in range(periods):
        pooled: Shapes | None = None
        for device in range(world.devices):
            changes = case.changed and period >= BEGINS and device < case.share * world.devices
            window = world.window(case.changed if changes else "", device, rng, case.answers)
            window = noised(window, case.epsilon, rng) if case.epsilon else window
            fleet.see(period, device, window)
            pooled = window if pooled is None else pooled + window
        evidence.append(fleet.watch.log_evidence)
        assert pooled is not None
        if fleet.watch.alarm is not None:
            alarms.setdefault("watch", period)
        if period < BASELINE:
            baseline = pooled if baseline is None else baseline + pooled
        elif baseline is not None:
            for name, raised in others(pooled, world.reference, baseline).items():
                if raised:
                    alarms.setdefault(name, period)
    return Found(alarms, evidence)


def others(pooled: Shapes, reference: Shapes, baseline: Shapes) -> dict[str, bool]:
    """What the ways that count answers say of one period."""
    each = LEVEL / PERIODS / (len(pooled.inputs) + 2)
    stable = max(
        index(pooled.inputs, baseline.inputs).max(),
        index(pooled.confidence[None], baseline.confidence[None])[0],
        index(pooled.answers[None], baseline.answers[None])[0],
    )
    return {
        "pooled to reference": least_p(pooled, reference) <= each,
        "pooled to baseline": least_p(pooled, baseline) <= each,
        "PSI > 0.2": bool(stable > 0.2),
    }


def least_p(one: Shapes, two: Shapes) -> float:
    """The smallest p of Pearson's chi-square tests of homogeneity, one for each histogram."""
    rows = [
        *zip(one.inputs, two.inputs, strict=True),
        (one.confidence, two.confidence),
        (one.answers, two.answers),
    ]
    return min(homogeneity(a, b) for a, b in rows)


def homogeneity(a: Floats, b: Floats) -> float:
    """Pearson 1911: whether two histograms are of one distribution."""
    a, b = np.maximum(a, 0), np.maximum(b, 0)
    both = a + b
    a, b = a[both > 0], b[both > 0]
    expected = (a + b)[None] * np.array([[a.sum()], [b.sum()]]) / (a.sum() + b.sum())
    statistic = (np.square(np.stack([a, b]) - expected) / expected).sum()
    return float(chi2.sf(statistic, max(len(a) - 1, 1)))


def noised(window: Shapes, epsilon: float, rng: np.random.Generator) -> Shapes:
    """Noise of the distribution that `fedge.telemetry.privacy` draws exactly; numpy is faster."""
    q = 1 - np.exp(-epsilon / (2 * (len(window.inputs) + 4)))

    def more(values: Floats) -> Floats:
        return values + rng.geometric(q, values.shape) - rng.geometric(q, values.shape)

    return Shapes(more(window.inputs), more(window.confidence), more(window.answers))


def newcomers(world: World, changed: str, seed: int) -> int | None:
    """After how many changed devices the alarm comes; devices join one by one, 60 unchanged ones first."""
    rng, watch = np.random.default_rng(seed), Watch()
    for joined in range(100):
        track, device = Track(), int(rng.integers(world.devices))
        for slot in range(BASELINE):
            window = world.window(changed if joined >= 60 else "", device, rng, 0)
            watch, track = observe(
                SETTINGS, watch, track, period=joined, slot=slot, window=window, reference=world.reference
            )
        if watch.alarm is not None:
            return joined - 59
    return None


def row_of(case: Case, found: list[Found]) -> Row:
    """Alarms before and after the change, and how soon."""
    row: dict[str, str | int | float] = {"case": case.name, "runs": len(found)}
    for name in NAMES:
        when = [run.alarms.get(name) for run in found]
        if case.changed:
            after = [period - BEGINS + 1 for period in when if period is not None and period >= BEGINS]
            false = sum(period is not None and period < BEGINS for period in when)
            delay = f", after {statistics.median(after):.0f}" if after else ""
            row[name] = f"{len(after) / len(found):.2f}{delay}" + (
                f" (false {false / len(found):.2f})" if false else ""
            )
        else:
            row[name] = f"{sum(period is not None for period in when) / len(found):.2f}"
    return row


def quiet(har: World, fashion: World) -> list[Case]:
    """Nothing changes."""
    return [
        Case("people, nothing changes", har),
        Case("images, nothing changes", fashion),
        Case("images, nothing changes, epsilon 2", fashion, answers=500, epsilon=2.0),
    ]


def changes(har: World, fashion: World) -> list[Case]:
    """Something does."""
    return [
        Case("people, sensor turned", har, "turned"),
        Case("people, sensor turned, a third", har, "turned", 1 / 3),
        Case("people, watch for phone", har, "watch"),
        Case("images, a quarter turn", fashion, "quarter"),
        Case("images, turned by 15 degrees", fashion, "tilted"),
        Case("images, turned by 3 degrees", fashion, "slight"),
        Case("images, turned by 3, a third", fashion, "slight", 1 / 3),
        Case("images, turned by 15, a tenth", fashion, "tilted", 0.1),
        Case("images, darker by 30 %", fashion, "dark"),
        Case("images, other classes", fashion, "classes"),
        Case("images, 15 degrees, epsilon 8", fashion, "tilted", answers=500, epsilon=8.0),
        Case("images, 15 degrees, epsilon 2", fashion, "tilted", answers=500, epsilon=2.0),
    ]


def claims_of(case: Case, found: list[Found]) -> dict[str, float]:
    """The numbers that documents quote."""
    if not case.changed and not case.epsilon:
        kind = case.name.split(",")[0]
        keys = ("", "_pooled_to_reference", "_pooled_to_baseline", "_psi")
        return {
            f"false_alarms_{kind}{key}": sum(name in each.alarms for each in found) / len(found)
            for name, key in zip(NAMES, keys, strict=True)
        }
    if case.changed in ("turned", "quarter") and case.share == 1:
        when = [each.alarms.get("watch", 10**9) - BEGINS + 1 for each in found]
        return {f"periods_to_alarm_{case.changed}": statistics.median(when)}
    return {}


def joining(har: World, fashion: World, runs: int) -> list[Row]:
    """New devices, like those before and unlike them."""
    rows: list[Row] = []
    for name, world, changed in (
        ("new people, all alike", har, ""),
        ("new people with a watch", har, "watch"),
        ("new devices, all alike", fashion, ""),
        ("new devices, darker by 30 %", fashion, "dark"),
    ):
        joined = [newcomers(world, changed, seed) for seed in range(runs)]
        some = [each for each in joined if each is not None]
        after = f", after {statistics.median(some):.0f} devices" if some else ""
        text = f"{len(some) / runs:.2f}{after}"
        rows.append({"case": name, "runs": runs, "watch": text, **dict.fromkeys(NAMES[1:], "")})
    return rows


def cost() -> tuple[dict[str, float], list[Row]]:
    """What an answer costs a device, with and without its inputs counted, and a window the server."""
    rng, spec = np.random.default_rng(0), Spec("signal", (50, 6), "float32", tuple("abcde"))
    x, p = rng.normal(size=(500, 50, 6)).astype(np.float32), rng.dirichlet(np.ones(5), 500)
    reference = Reference.of(x, p, spec)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fedge-drift-") as folder:
        for name, known in (("us_per_answer", reference), ("us_per_answer_without_inputs", None)):
            place = Path(folder) / name
            collector = Collector(place, Answering(1, spec, known), Collecting(period_s=604_800))

            def count(collector: Collector = collector) -> None:
                for i in range(100):
                    collector.answered(x[i : i + 1], p[i : i + 1], 0.01)

            figures[name] = median_s(count) / 100 * 1e6
            collector.keep()
            if known is not None:
                window = Window.from_bytes((place / "open").read_bytes())
                figures["window_bytes"] = float(len(window.to_bytes()))
    shapes, slots = Shapes.of(window.sketch), iter(range(10**6))
    states = [(Watch(), Track())]

    def watched() -> None:
        for slot in (next(slots) for _ in range(20)):
            states[0] = observe(SETTINGS, *states[0], period=slot, slot=slot, window=shapes, reference=None)

    figures["ms_per_window_watched"] = median_s(watched) / 20 * 1e3
    return figures, [{"cost": name, "value": value} for name, value in figures.items()]


def median_s(work: Callable[[], None]) -> float:
    """CPU seconds."""
    found = []
    for _ in range(15):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def main() -> None:
    """Measure, print, write, draw."""
    asked, before = options(__doc__ or "", parts=PARTS, data=True), machine()
    runs, without = (3, 6) if asked.quick else (12, 40)
    only = asked.only or PARTS
    kinds: list[Case] = []
    if set(only) - {"cost"}:
        worlds = people(asked.data / "uji_har.npz"), images(asked.data / "fashion_mnist.npz")
        kinds += quiet(*worlds) if "quiet" in only else []
        kinds += changes(*worlds) if "changes" in only else []
    rows: list[Row] = []
    claims: dict[str, float] = {"false_alarms_stated": LEVEL}
    drawn: dict[str, list[Found]] = {}
    for case in kinds:
        periods, times = (BEGINS + AFTER, runs) if case.changed else (PERIODS, without)
        found = [run(case, seed, periods) for seed in range(times)]
        rows.append(row_of(case, found))
        claims |= claims_of(case, found)
        drawn[case.name] = found
    if "changes" in only:
        rows += joining(*worlds, runs)
    if "cost" in only:
        figures, more = cost()
        claims, rows = claims | figures, rows + more
    if drawn:
        _plot(asked.json.with_suffix(".svg"), drawn)
    publish(asked, before, claims, rows)


def _plot(path: Path, drawn: dict[str, list[Found]]) -> None:
    def paint(axes: Axes) -> None:
        for name, found in drawn.items():
            curves = np.array([each.evidence[: BEGINS + AFTER] for each in found])
            axes.plot(np.median(curves, axis=0), label=name, linestyle="--" if "nothing" in name else "-")
        axes.axhline(SETTINGS.threshold, color="black", linewidth=0.8)
        axes.axvline(BEGINS, color="grey", linewidth=0.8)
        axes.set(xlabel="period", ylabel="log evidence", ylim=(-6, 60))
        axes.legend(fontsize=6)

    path.parent.mkdir(parents=True, exist_ok=True)
    note = "Medians over runs; the line is the alarm, the change begins at period 30"
    path.write_text(draw("Evidence of a change", note, paint).svg, encoding="utf-8")


if __name__ == "__main__":
    main()
