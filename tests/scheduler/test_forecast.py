"""What the scheduler expects of the near future."""

from __future__ import annotations

import pytest

from scheduler.forecast import FIRST_SERVICE_S, SLOW_S, Demand, drain_s


def steady(rate: float, seconds: float, look_every_s: float) -> Demand:
    demand, looked = Demand(), 0.0
    for arrival in range(int(rate * seconds)):
        demand.count += 1
        if (now := (arrival + 1) / rate) - looked >= look_every_s:
            demand.rate(now, now)
            looked = now
    return demand


@pytest.mark.parametrize("look_every_s", [0.0, 1.0, 30.0])
def test_a_steady_rate_is_found_however_seldom_one_looks(look_every_s: float) -> None:
    assert steady(2.0, 120.0, look_every_s).rate(120.0, 120.0) == pytest.approx(2.0, rel=0.15)


def test_a_young_average_is_not_taken_for_a_low_rate() -> None:
    assert steady(2.0, 10.0, 1.0).slow_rate(10.0, 10.0) == pytest.approx(2.0, rel=0.1)


def test_a_burst_raises_the_forecast_at_once_and_is_forgotten_in_time() -> None:
    demand = Demand()
    demand.rate(600.0, 600.0)
    demand.count += 20
    assert demand.rate(601.0, 601.0) > 1.0
    assert demand.rate(660.0, 660.0) < 0.1
    assert demand.rate(660.0 + 5 * SLOW_S, 660.0 + 5 * SLOW_S) < 1e-3


@pytest.mark.parametrize("begun_s", [0.0, 1e6])
def test_what_came_before_the_first_look_counts_wherever_the_clock_began(begun_s: float) -> None:
    """A machine's clock counts from its own start: ten requests must not be spread over its uptime."""
    demand = Demand()
    demand.count += 10
    assert demand.slow_rate(begun_s, SLOW_S) == pytest.approx(10 / SLOW_S / 0.632, rel=0.01)


def test_the_mean_service_is_learned_from_the_first_answer_on() -> None:
    demand = Demand()
    assert demand.mean_service_s() == FIRST_SERVICE_S
    demand.served, demand.busy_s = 1, 8.0
    assert demand.mean_service_s() == 8.0
    demand.served, demand.busy_s = 100, 200.0
    assert demand.mean_service_s() == pytest.approx(2.0, abs=0.01)


def test_a_drain_lasts_a_mean_times_a_harmonic_number() -> None:
    assert drain_s(0, 5.0) == 0.0
    assert drain_s(1, 5.0) == 5.0
    assert drain_s(3, 6.0) == pytest.approx(6.0 + 3.0 + 2.0)
    assert drain_s(300, 1.0) > drain_s(256, 1.0)
