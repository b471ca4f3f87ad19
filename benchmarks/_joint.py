"""Joint inference on Fashion-MNIST: the smallest variant of the search, and its teacher in the cloud."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from _harness import Options, Row
from compression import searched, setting_of, whole

from fedge.routing import DOUBTS, Calibrated, Rule, for_gap, for_share
from fedge_server.page import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STUDENT = "cnn3-12"  # what the search among all students chose; `--quick` and this take it for granted
MOST = 0.2  # share of requests that may be sent
GAP = 0.002  # in fractions of 1
SPLITS = 200  # of the data into two halves, to see how often a promise is kept

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answers:
    """What device and cloud say of the gate's data, and what is right."""

    device: Rows  # (N, classes)
    cloud: Rows
    y: npt.NDArray[np.int64]
    bytes: int  # of the variant on the wire

    def half(self, chosen: npt.NDArray[Any]) -> Answers:
        """Some of them."""
        return Answers(self.device[chosen], self.cloud[chosen], self.y[chosen], self.bytes)

    @property
    def right(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether the device's answers are right, and the cloud's."""
        return self.device.argmax(1) == self.y, self.cloud.argmax(1) == self.y


def answers_of(data: Path, cache: Path, seed: int, *, quick: bool) -> Answers:
    """From the cache, or by a search under a trained teacher, which takes minutes."""
    kept = cache / f"{'quick-' if quick else ''}joint-{seed}.npz"
    if not kept.exists():
        setting = setting_of(data, cache, seed, "cnn", quick=quick)
        compress = replace(setting.config.compress, students=(STUDENT,))
        outcome, _ = searched(replace(setting, config=replace(setting.config, compress=compress)))
        variant = outcome.variant
        if variant is None or variant.probabilities is None:
            raise RuntimeError(f"no variant passed its gate: {outcome.reason}")
        gate = setting.data.gate
        with torch.no_grad():
            rows = [
                torch.softmax(setting.teacher(torch.from_numpy(x)), 1) for x in np.array_split(gate.x, 40)
            ]
        np.savez(kept, device=variant.probabilities, cloud=torch.cat(rows), y=gate.y, bytes=len(variant.wire))
    with np.load(kept) as found:
        return Answers(found["device"], found["cloud"], found["y"].astype(np.int64), int(found["bytes"]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a threshold brings on data that it was not calibrated on."""

    sent: float  # share
    accuracy: float
    worse: float  # than the cloud alone; fractions of 1


def outcome_of(answers: Answers, rule: Rule) -> Outcome:
    """Device below the threshold, cloud above it."""
    sent = rule.doubts(answers.device) > rule.threshold
    device, cloud = answers.right
    accuracy = float(np.where(sent, cloud, device).mean())
    return Outcome(float(sent.mean()), accuracy, float(cloud.mean()) - accuracy)


def calibrated(answers: Answers, doubt: str) -> dict[str, Calibrated]:
    """Both promises."""
    doubts = DOUBTS[doubt](answers.device)
    return {
        "a fifth sent": for_share(doubts, MOST, doubt=doubt),
        "0.2 points": for_gap(doubts, *answers.right, GAP, doubt=doubt),
    }


def rows_of(seed: int, answers: Answers) -> list[Row]:
    """Calibrated on one half, measured on the other; and how often that kept the promise over many halves."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(answers.y))
    first, second = answers.half(order[::2]), answers.half(order[1::2])
    device, cloud = second.right
    rows: list[Row] = []
    for doubt in DOUBTS:
        for promise, found in calibrated(first, doubt).items():
            got = outcome_of(second, found.rule)
            rows.append(
                {
                    "seed": seed,
                    "bytes": answers.bytes,
                    "doubt": doubt,
                    "promise": promise,
                    "threshold": found.rule.threshold,
                    "sent %": 100 * got.sent,
                    "device %": 100 * float(device.mean()),
                    "cloud %": 100 * float(cloud.mean()),
                    "joint %": 100 * got.accuracy,
                    "points below the cloud": 100 * got.worse,
                    "broken, % of halves": 100 * broken(answers, doubt, promise, seed),
                }
            )
    return rows


def broken(answers: Answers, doubt: str, promise: str, seed: int) -> float:
    """How often a threshold from one half breaks its promise on the other; both halves are samples.

    So this counts some that are kept in truth as broken, and is above what is promised.
    """
    rng = np.random.default_rng((seed, 1))
    count = 0
    for _ in range(SPLITS if promise == "a fifth sent" else SPLITS // 4):
        order = rng.permutation(len(answers.y))
        rule = calibrated(answers.half(order[::2]), doubt)[promise].rule
        got = outcome_of(answers.half(order[1::2]), rule)
        count += got.sent > MOST if promise == "a fifth sent" else got.worse > GAP
    return count / (SPLITS if promise == "a fifth sent" else SPLITS // 4)


def curve(answers: Answers, order: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Accuracy when the first 0, 1, ..., N of an order go to the cloud (N + 1,)."""
    device, cloud = answers.right
    gains = cloud[order].astype(np.int64) - device[order]
    return np.concatenate([[device.sum()], device.sum() + np.cumsum(gains)]) / len(order)


def orders(answers: Answers) -> dict[str, npt.NDArray[Any]]:
    """By each measure; and by who is right, which nobody can know."""
    device, cloud = answers.right
    found = {name: np.argsort(-of(answers.device), kind="stable") for name, of in DOUBTS.items()}
    found["oracle"] = np.argsort(device.astype(np.int64) - cloud, kind="stable")
    return found


def plot(path: Path, all_answers: list[Answers]) -> None:
    """Accuracy against the share that is sent, seed 0."""
    answers = all_answers[0]
    device, cloud = (float(right.mean()) for right in answers.right)

    def paint(axes: Axes) -> None:
        share = 100 * np.arange(len(answers.y) + 1) / len(answers.y)
        for name, order in orders(answers).items():
            axes.plot(share, 100 * curve(answers, order), label=name)
        axes.plot([0, 100], [100 * device, 100 * cloud], "--", label="at random")
        axes.axhline(100 * cloud, color="0.6", linewidth=0.8)
        axes.set_xlabel("% of requests sent to the cloud")
        axes.set_ylabel("% right")
        axes.legend(fontsize=7)

    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"Fashion-MNIST: a variant of {answers.bytes:,} bytes and its teacher"
    path.write_text(draw("Accuracy against share sent", title, paint).svg, encoding="utf-8")


def measured(asked: Options) -> tuple[dict[str, float], list[Row]]:
    """Claims and rows."""
    seeds = (0,) if asked.quick else (0, 1)
    with tempfile.TemporaryDirectory() as scratch:
        data = whole(asked.data, Path(scratch))
        all_answers = [answers_of(data, asked.cache, seed, quick=asked.quick) for seed in seeds]
    plot(asked.json.with_suffix(".svg"), all_answers)
    rows = [row for seed, answers in zip(seeds, all_answers, strict=True) for row in rows_of(seed, answers)]
    claimed = [row for row in rows if row["doubt"] == "confidence" and row["promise"] == "a fifth sent"]
    claims = {
        "joint_share_sent": max(float(row["sent %"]) for row in claimed) / 100,
        "joint_gap_points": max(float(row["points below the cloud"]) for row in claimed),
    }
    return claims, rows
