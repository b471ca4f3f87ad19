"""Which bytes are no longer kept: a decision over values, nothing is read or removed here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedge.errors import UserError
from fedge_server.registry.living import Retired


@dataclass(frozen=True, slots=True)
class Keep:
    """How much is kept.

    Raises:
        UserError: a number is out of range.
    """

    releases: int = 16  # of each tier: the newest, and as many drafts that were refused
    runs: int = 100  # that are over: the newest
    unseen_s: float = 90 * 86_400.0  # what a device runs is kept for so long after it was seen last

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        for name in ("releases", "runs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: the newest is always kept; give 1 or more")
        if not 0 < self.unseen_s < 1e10:
            raise UserError(f"unseen_s = {self.unseen_s:g}: must be above 0")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the decision rests on; of what was retired before nothing is said."""

    variants: frozenset[tuple[int, str]] = frozenset()  # release and tier
    rolling: frozenset[tuple[int, str]] = frozenset()  # that rollouts offer, or may go back to
    running: frozenset[tuple[int, str]] = frozenset()  # on devices
    named: frozenset[int] = frozenset()  # releases that configurations begin with
    refused: tuple[tuple[str, str], ...] = ()  # draft and tier, newest first
    over: tuple[str, ...] = ()  # runs, newest first
    busy: frozenset[str] = field(default=frozenset())  # runs that a draft, a cycle or another run still needs


def retire(facts: Facts, keep: Keep) -> Retired:
    """What is not kept any more.

    A variant is kept while it is among the newest of its tier, or something may still ask for its bytes: a
    rollout (whose way back publishes the content of the release before), a device that runs it and asks the
    cloud or counts by its reference, a run or a learning whose configuration begins with its global model.
    A draft that awaits its signature is kept however old it is.
    """
    newest = _newest(((tier, version) for version, tier in facts.variants), keep.releases)
    needed = facts.rolling | facts.running | {(version, tier) for tier, version in newest}
    gone = {each for each in facts.variants - needed if each[0] not in facts.named}
    tiers: defaultdict[str, int] = defaultdict(int)
    refused = set()
    for draft, tier in facts.refused:
        tiers[tier] += 1
        if tiers[tier] > keep.releases:
            refused.add((draft, tier))
    runs = {run for run in facts.over[keep.runs :] if run not in facts.busy}
    return Retired(frozenset(gone), frozenset(refused), frozenset(runs))


def _newest(variants: Iterable[tuple[str, int]], count: int) -> set[tuple[str, int]]:
    by_tier: defaultdict[str, list[int]] = defaultdict(list)
    for tier, version in variants:
        by_tier[tier].append(version)
    return {(tier, v) for tier, versions in by_tier.items() for v in sorted(versions)[-count:]}
