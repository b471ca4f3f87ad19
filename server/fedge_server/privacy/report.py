"""Who could see what of a run, and what protected its clients: said plainly, from what is known anyway.

A pure function of configuration, records and epsilon: the same for a run in progress, one that is over, and
one of years ago. It publishes nothing that the run's noise does not cover, but for counts of clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedge.config import Config
from fedge.learning.guard import KINDS
from fedge_server.rounds.record import RoundRecord


@dataclass(frozen=True, slots=True)
class Viewer:
    """One party, and what it could see of the clients' data in this run."""

    who: str
    sees: str
    single_updates: bool  # sees the update of a single client as it is
    bounded: bool  # what it sees is covered by epsilon


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """What a run gave away, and to whom."""

    mechanism: str
    protects: (
        bool  # whether noise protects anybody: without a mechanism, or with noise from a seed, it does not
    )
    statements: tuple[str, ...]  # in the order of their weight
    viewers: tuple[Viewer, ...]
    epsilon: float | None  # of a client (mechanism example: of one of its examples), of all in the ledger
    delta: float | None
    ledger: str | None
    accountant: str | None
    noise: str | None  # 'secret', or 'seed' where it can be made again
    clip_norm: float | None  # of the last round
    clipped_share: float | None  # noised, of the last round; None: not counted, for nothing would cover it
    secure_aggregation: bool  # single updates stay under masks
    neighbourhood: int | None  # secure aggregation: holders of shares of a client's secrets
    shares: int | None  # of them whose shares open one; of the last round, as the line above
    cut: int | None  # clients of the last round of which a value was cut to privacy.secure_range
    aborted: int  # rounds whose sum stayed closed
    threshold: int  # valid updates below which a round changes nothing
    smallest_round: int | None  # fewest updates that went into one aggregate; None: no round counted
    asked: int  # in all rounds together
    dropouts: int  # of these without a usable update: failed, late or rejected

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; `single_updates_seen_by` names those whom its clients must trust."""
        facts = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("viewers", "statements")
        }
        return {
            **{name: value for name, value in facts.items() if value is not None},
            "single_updates_seen_by": [viewer.who for viewer in self.viewers if viewer.single_updates],
            "statements": list(self.statements),
            "viewers": [
                {name: getattr(viewer, name) for name in Viewer.__dataclass_fields__}
                for viewer in self.viewers
            ],
        }


def privacy_report(
    config: Config,
    records: Sequence[RoundRecord],
    *,
    epsilon: float | None,
    moments: bool,
    simulated: bool,
) -> PrivacyReport:
    """What this run's clients gave away.

    Args:
        config: of the run.
        records: of its rounds, the initial model's first.
        epsilon: that the ledger holds now for whom the mechanism hides; None without a mechanism.
        moments: clients were asked for those of their raw values.
        simulated: its clients were made up, and so are their devices.
    """
    privacy, rounds = config.privacy, [record for record in records if record.round > 0]
    protected = privacy.mechanism != "none"
    said = rounds[-1].privacy if rounds and protected else {}
    noise = str(said["noise"]) if "noise" in said else None
    shown = epsilon if epsilon is not None and math.isfinite(epsilon) else None
    protects = protected and noise == "secret" and shown is not None
    counted = [record.clients for record in rounds if record.counted]
    return PrivacyReport(
        mechanism=privacy.mechanism,
        protects=protects,
        statements=_statements(
            config, noise, shown, alone=1 in counted, moments=moments, simulated=simulated
        ),
        viewers=_viewers(config, bounded=protects, moments=moments),
        epsilon=shown if protected else None,
        delta=privacy.delta if protected else None,
        ledger=privacy.ledger if protected else None,
        accountant=privacy.accountant if protected else None,
        noise=noise,
        clip_norm=float(said["clip_norm"]) if "clip_norm" in said else None,
        clipped_share=_clipped(config, said),
        secure_aggregation=privacy.secure_aggregation,
        neighbourhood=_last(rounds, "secure_neighbours", plus=1),
        shares=_last(rounds, "secure_threshold"),
        cut=_last(rounds, "secure_cut"),
        aborted=sum("aborted" in record.privacy for record in rounds),
        threshold=_last(rounds, "secure_least") or config.rounds.min_updates,
        smallest_round=min(counted, default=None),
        asked=sum(record.asked for record in rounds),
        dropouts=sum(record.failures for record in rounds),
    )


def _last(rounds: Sequence[RoundRecord], name: str, *, plus: int = 0) -> int | None:
    """What the last round that has such a number says."""
    found = [int(record.privacy[name]) for record in rounds if name in record.privacy]
    return found[-1] + plus if found else None


def _clipped(config: Config, said: Mapping[str, float | str]) -> float | None:
    """The noised share of clipped clients, read off the clipping norm's step (Andrew et al. 2021).

    Within 0..1, although the noise may have carried it beyond.
    """
    if "next_clip_norm" not in said:
        return None
    privacy = config.privacy
    step = math.log(float(said["next_clip_norm"]) / float(said["clip_norm"]))
    unclipped = privacy.clip_quantile - step / privacy.clip_learning_rate
    return round(min(max(1 - unclipped, 0.0), 1.0), 4)


def _statements(
    config: Config, noise: str | None, epsilon: float | None, *, alone: bool, moments: bool, simulated: bool
) -> tuple[str, ...]:
    privacy, found = config.privacy, []
    if privacy.mechanism == "none":
        found.append(_SUMS if privacy.secure_aggregation else _NOTHING)
        found.append("No epsilon bounds what the global model and its variants show about a client.")
        if alone:
            found.append(
                "Some round was made of a single update: whoever has the models before and after it has "
                "that update."
            )
    elif epsilon is None:
        found.append("No epsilon can be stated: the ledger promises nothing to a client.")
    else:
        bounded = "is" if noise == "secret" else "would, by secret noise, be"
        whom = "one example of a client" if privacy.mechanism == "example" else "a client"
        found.append(
            f"Whatever the models show about {whom} {bounded} bounded by epsilon {epsilon:.3g} at delta "
            f"{privacy.delta:g}, over all rounds of all runs in ledger {privacy.ledger!r}."
        )
        found.append(_TOWARDS[privacy.mechanism])
        if privacy.secure_aggregation:
            found.append(_SUMS)
        if noise == "seed":
            found.append(
                "The noise comes from the seed and can be taken off again: it protects nobody, and shows "
                "what such noise costs."
            )
    if moments:
        found.append("Each client also sends sums of its raw values (moments), which nothing protects.")
    if config.evaluate.federated:
        found.append("Clients also send their own loss and accuracy, which nothing protects.")
    if simulated:
        found.append("This run is a simulation: its clients and their devices are made up.")
    return tuple(found)


_NOTHING = (
    "Nothing protects the updates: hub, worker and operator can see each single one, and an update "
    "gives training data back."
)
_SUMS = (
    "Hub, worker and operator see the sum of a round's changes and no single one, unless they make devices "
    "up or tell them to train without masks: secure aggregation protects against a server that keeps to the "
    "protocol and looks."
)
_TOWARDS = {
    "central": "That holds towards whoever sees models, not towards hub, worker and operator: they can see "
    "each single update before the noise, and an update gives training data back.",
    "local": "That holds towards hub, worker and operator too, as long as the run asks for what its "
    "configuration says: each device adds noise before it sends anything.",
    "distributed": "That holds towards hub, worker and operator too, as long as the run asks for what its "
    "configuration says and enough devices do it: each adds its share of the noise before it sends anything.",
    "example": "That holds towards hub, worker and operator too, as long as the run asks for what its "
    "configuration says. It hides single examples and not the device: what most of its data says shows.",
}


def _viewers(config: Config, *, bounded: bool, moments: bool) -> tuple[Viewer, ...]:
    on_device = config.privacy.mechanism in KINDS  # what is sent has its noise already
    sent = ["update with the device's noise"] if on_device else ["single update", "training loss"]
    sent += [] if config.privacy.mechanism == "local" else ["number of examples"]
    sent += ["moments of its raw values"] if moments else []
    sent += ["own evaluation"] if config.evaluate.federated else []
    each = f"of every client that answers: {', '.join(sent)}"
    covered = bounded and on_device
    summed = config.privacy.secure_aggregation
    if summed:
        sums = "noised changes" if on_device else "changes, examples and losses"
        each = f"the sum of each round's {sums}; masked changes and keys of every client"
    single = not covered and not summed
    models = "the noised global model" if config.privacy.mechanism != "none" else "the global model"
    return (
        Viewer("device", f"its own data; {models} of every round that asks it", False, bounded),
        Viewer("other clients", f"{models} of the rounds that ask them", False,
               bounded),
        Viewer("hub", f"{each}; who takes part, when, from which address", single, covered),
        Viewer("worker", f"{each}; by number, not by name", single, covered),
        Viewer("operator", "what hub and worker see, their files, and the database", single, covered),
        Viewer("whoever has a release", f"variants made from {models}", False, bounded),
    )  # fmt: skip
