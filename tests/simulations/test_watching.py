"""From answers on devices to a decision in the cloud: counted, sent, watched, decided; nothing left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge_client.telemetry.collector import Answering, Collector, Settings
from fedge_server.continual.deciding import decide, step
from fedge_server.continual.state import Drift, Policy, State, Status
from fedge_server.drift.permutation import paired
from fedge_server.drift.scores import Shapes, feature_shifts
from fedge_server.drift.watch import Settings as DriftSettings
from fedge_server.registry.database import Registry
from fedge_server.telemetry.store import Sender, Telemetry
from fedge_server.telemetry.store import Settings as StoreSettings

HOUR, DEVICES, TURNED = 3600, 8, 18
SPEC = Spec("image", (8, 8), "uint8", tuple("0123456789"))


class Prototypes:
    """A model: how near an image is to each class's mean."""

    def __init__(self) -> None:
        x, self.y = load_digits(return_X_y=True)
        self.x = (x.reshape(-1, 8, 8) * 15).astype(np.uint8)
        self.means = np.stack([self.x[self.y == k].mean(0).ravel() for k in range(10)])

    def answer(self, x: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        distance = np.square(x.reshape(len(x), 1, -1) - self.means).mean(2) / 500
        raised = np.exp(-(distance - distance.min(1, keepdims=True)))
        found: npt.NDArray[np.float64] = raised / raised.sum(1, keepdims=True)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [None, 20.0])
def test_images_that_come_turned_lead_to_a_cycle_and_not_before(
    tmp_path: Path, epsilon: float | None
) -> None:
    model, clock, draw = Prototypes(), [400_000.0 * HOUR], np.random.default_rng(0)
    reference = Reference.of(model.x, model.answer(model.x), SPEC)
    settings = Settings(epsilon=epsilon)
    collectors = [
        Collector(tmp_path / str(number), Answering(1, SPEC, reference), settings, now=lambda: clock[0])
        for number in range(DEVICES)
    ]
    mixes = draw.dirichlet(np.full(10, 1.0), DEVICES)  # each device has classes of its own
    policy, state = Policy(steady_s=HOUR), State()
    with Registry.open(tmp_path / "home") as registry:
        registry.begin_run("r", task="t", seed=0, config={}, data="")
        registry.record_release(
            version=1, run_id="r", round_number=1, global_model="", manifest=b"", variants=[]
        )
        watching = StoreSettings(drift=DriftSettings(baseline=3))
        telemetry = Telemetry(registry.engine, watching, lambda *_: reference, lambda: clock[0])
        for hour in range(TURNED + 4):
            for number, collector in enumerate(collectors):
                weights = mixes[number][model.y]
                chosen = draw.choice(len(model.y), 60, p=weights / weights.sum())
                x = model.x[chosen]
                x = np.rot90(x, axes=(1, 2)).copy() if hour >= TURNED else x
                collector.answered(x, model.answer(x), 0.003)
            clock[0] += HOUR
            for number, collector in enumerate(collectors):
                for slot, data in collector.due(10):
                    (outcome,) = telemetry.take(Sender(f"{number:064}", "micro"), [data])
                    assert outcome.kind == "counted"
                    collector.sent(slot)
            alarm = telemetry.watch("micro", 1).alarm
            state, _ = decide(policy, state, Drift(alarm is not None, 1), clock[0])
            assert hour >= TURNED or state.status is Status.WATCHING
        assert step(state).status is Status.RUNNING
        assert state.cause == "drift"
        since = (400_000 + TURNED) * HOUR + 1.0
        before, after = (
            dict(telemetry.windows("micro", 1, since=a, until=b))
            for a, b in ((since - 3 * HOUR, since), (since, since + 3 * HOUR))
        )
    differences = np.stack(
        [feature_shifts(Shapes.of(after[d].sketch), Shapes.of(before[d].sketch)) for d in before]
    )
    changed = paired(differences).named(0.05)
    assert changed
    assert any(reference.names[i].startswith("cell") for i in changed if i < len(reference.names))
