"""Epsilon: beside dp-accounting, beside closed forms, and never below either."""

from __future__ import annotations

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedge_server.privacy.accounting import PLD_UP_TO, Spend, epsilon

# (sampling, noise multiplier, rounds, delta)
GRID = [
    pytest.param(q, z, rounds, delta, marks=pytest.mark.slow if delta < 1e-6 or z != 4 or q == 1 else ())
    for q in (0.01, 0.1, 1.0)
    for z, rounds in ((0.8, 10), (1.0, 100), (4.0, 300))
    for delta in (1e-5, 1e-7)
]


def spent(q: float, z: float, rounds: int) -> list[Spend]:
    return [Spend("client", q, z)] * rounds


def exact_gaussian(z: float, rounds: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the smallest epsilon of `rounds` Gaussian mechanisms, by bisection."""
    mu = math.sqrt(rounds) / z

    def excess(eps: float) -> float:
        return (
            norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - delta
        )  # decreasing in eps

    return float(brentq(excess, 0, 1000))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("q", "z", "rounds", "delta"), GRID)
def test_it_is_within_one_per_cent_of_dp_accounting_and_never_below(accountant, q, z, rounds, delta):
    found = epsilon(spent(q, z, rounds), delta, unit="client", accountant=accountant)
    event = GaussianDpEvent(z) if q == 1 else PoissonSampledDpEvent(q, GaussianDpEvent(z))
    theirs = RdpAccountant().compose(event, rounds).get_epsilon(delta)
    if accountant == "pld" and theirs <= PLD_UP_TO:
        theirs = min(theirs, PLDAccountant().compose(SelfComposedDpEvent(event, rounds)).get_epsilon(delta))
    assert theirs * (1 - 1e-9) <= found <= theirs * 1.01


@pytest.mark.quick_where(rounds=(1,))
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("z", "rounds", "delta"), [(1.0, 1, 1e-5), (2.0, 10, 1e-5), (5.0, 100, 1e-6)])
def test_it_is_not_below_the_exact_epsilon_of_gaussians(accountant, z, rounds, delta):
    exact = exact_gaussian(z, rounds, delta)
    found = epsilon(spent(1.0, z, rounds), delta, unit="client", accountant=accountant)
    assert exact <= found <= exact * (1.001 if accountant == "pld" else 1.15)


def test_known_numbers():
    assert epsilon(spent(0.1, 1.0, 100), 1e-5, unit="client", accountant="rdp") == pytest.approx(
        7.90, abs=0.01
    )
    assert epsilon(spent(0.1, 1.0, 100), 1e-5, unit="client", accountant="pld") == pytest.approx(
        7.05, abs=0.01
    )
    # The classical bound sqrt(2 ln(1.25 / delta)) / z of one Gaussian, for epsilon below 1, is larger.
    assert (
        epsilon(spent(1.0, 5.0, 1), 1e-5, unit="client", accountant="pld")
        < math.sqrt(2 * math.log(1.25e5)) / 5
    )


@pytest.mark.quick_where(accountant=("rdp",))
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_each_round_costs_something_also_where_the_bound_changes_its_kind(accountant):
    found = [
        epsilon(spent(1.0, 1.0, n), 1e-5, unit="client", accountant=accountant)
        for n in (0, 1, 2, 40, 43, 46, 100)
    ]
    assert found[0] == 0.0
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@pytest.mark.slow
def test_rounds_of_different_kinds_add_up_in_any_order():
    mixed = spent(0.1, 1.0, 20) + spent(1.0, 4.0, 5)
    found = epsilon(mixed, 1e-5, unit="client", accountant="pld")
    assert found == epsilon(mixed[::-1], 1e-5, unit="client", accountant="pld")
    alone = [epsilon(part, 1e-5, unit="client", accountant="pld") for part in (mixed[:20], mixed[20:])]
    assert max(alone) < found < sum(alone)


def test_steps_of_one_row_count_each():
    together = [Spend("example", 0.1, 1.0, steps=100)]
    assert epsilon(together, 1e-5, unit="example", accountant="pld") == pytest.approx(7.05, abs=0.01)


@pytest.mark.slow
def test_hiding_examples_hides_no_client_and_hiding_clients_hides_their_examples():
    example, client = Spend("example", 0.1, 1.0, steps=10), Spend("client", 1.0, 5.0)
    assert epsilon([client, example], 1e-5, unit="client", accountant="pld") == math.inf
    both = epsilon([client, example], 1e-5, unit="example", accountant="pld")
    assert both > epsilon([example], 1e-5, unit="example", accountant="pld")


def test_next_to_no_noise_is_answered_at_once_and_honestly():
    assert epsilon(spent(0.1, 1e-9, 10), 1e-5, unit="client", accountant="pld") > 1e15
