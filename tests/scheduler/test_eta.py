"""What a waiting client is told, and whether it comes true."""

from __future__ import annotations

import random

import pytest

from scheduler.core import Core
from scheduler.eta import Calibration, Stage
from scheduler.events import Event
from scheduler.model import LatencyClass, RefusalCode, Ticket
from scheduler.simulate.engine import REFERENCE, GiB, device
from scheduler.simulate.run import Simulation, endless_settings
from scheduler.simulate.traces import Request
from tests.scheduler.conftest import MakeWorld, kinds, spec


def test_the_interval_covers_what_it_says_when_the_errors_have_a_law() -> None:
    rng = random.Random(3)
    calibration, inside = Calibration(), 0
    for turn in range(2000):
        eta = calibration.eta(Stage.QUEUED, 5.0)
        waited = 5.0 * rng.lognormvariate(0.5, 0.8)
        inside += turn >= 200 and eta.low_s <= waited <= eta.high_s
        calibration.learn(Stage.QUEUED, 5.0, waited)
    assert inside / 1800 == pytest.approx(0.8, abs=0.04)


def test_stages_learn_apart_and_follow_a_change() -> None:
    calibration = Calibration()
    for _ in range(300):
        calibration.learn(Stage.LOADING, 10.0, 10.0)
        calibration.learn(Stage.QUEUED, 10.0, 40.0)
    assert calibration.eta(Stage.LOADING, 10.0).expected_s == pytest.approx(10.0)
    assert calibration.eta(Stage.QUEUED, 10.0).low_s == pytest.approx(40.0)
    for _ in range(200):
        calibration.learn(Stage.QUEUED, 10.0, 20.0)
    assert calibration.eta(Stage.QUEUED, 10.0).high_s == pytest.approx(20.0)


def busy_hour(seed: int, models: int, seconds: float) -> list[Request]:
    """Popular and rare models, bursts, answers of many lengths."""
    rng = random.Random(seed)
    now, out = 0.0, []
    while now < seconds:
        now += rng.expovariate(0.6)
        model = f"m{min(models - 1, int(rng.expovariate(4 / models))):02d}"
        burst = range(rng.choice((1, 1, 2, 5)))
        out += [Request(now, model, 100, int(rng.expovariate(1 / 200))) for _ in burst]
    return out


@pytest.mark.parametrize("seed", [1, 2])
def test_four_of_five_waits_end_inside_the_interval_quoted_when_they_began(seed: int) -> None:
    requests = busy_hour(seed, 16, 900.0)
    core = Core([device(144 * GiB)], REFERENCE.specs(r.model for r in requests), endless_settings(10.0))
    quotes: dict[int, tuple[float, float]] = {}

    def watch(event: object, now: float) -> None:
        for ticket_id, waiting in core.tickets.waiting.items():
            if ticket_id not in quotes:
                eta = core.quote(waiting.ticket, now).eta
                quotes[ticket_id] = (now + eta.low_s, now + eta.high_s)

    outcome = Simulation(core, REFERENCE.service_s, requests, observe=watch).run()
    late = sorted(quotes)[100:]  # what comes first has nothing to learn from
    assert len(late) > 200
    inside = sum(quotes[i][0] - 0.1 <= requests[i].at_s + outcome.waits_s[i] <= quotes[i][1] + 0.1 for i in late)
    assert 0.7 <= inside / len(late) <= 0.92


def test_a_quote_changes_nothing_and_knows_what_a_load_costs(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, load_estimate_s=20.0), b=700)
    w.resident("b")
    before = repr(w.core)
    quote = w.core.quote(Ticket(999, "a"), w.now)
    assert quote.eta.expected_s == pytest.approx(20.0, rel=0.2)
    assert quote.eta.low_s < quote.eta.expected_s < quote.eta.high_s
    assert quote.damage_s == 20.0  # its load, that nobody else has asked for
    ready = w.core.quote(Ticket(999, "b"), w.now)
    assert (ready.eta.high_s, ready.damage_s) == (0.0, 0.0)
    assert repr(w.core) == before
    w.arrive("a")
    assert w.core.quote(Ticket(999, "a"), w.now).damage_s == 0.0  # somebody else has caused that load


def test_a_deadline_that_a_known_load_cannot_meet_is_refused_at_once(world: MakeWorld) -> None:
    w = world(memory=1000, a=spec("a", 700, load_estimate_s=20.0), b=700)
    w.resident("a")
    _, (stop,) = w.arrive("b")
    (load,) = w.stopped(stop)
    w.finish(2)
    ticket, (refusal,) = w.arrive("a", deadline_s=w.now + 1.0)
    assert kinds([refusal]) == [f"refuse {ticket} {RefusalCode.DEADLINE}"]
    assert refusal.retry_after_s >= 3.0
    assert "at best" in refusal.reason
    patient, commands = w.arrive("a", deadline_s=w.now + 300.0)
    assert commands == []
    assert w.core.describe(patient, w.now)
    w.ready(load)


def test_every_class_is_told_a_time(world: MakeWorld) -> None:
    w = world(a=700)
    for latency_class in LatencyClass:
        ticket, _ = w.arrive("a", latency_class)
        assert " s (" in w.core.describe(ticket, 0.0)


def test_an_event_type_is_what_a_watcher_is_told() -> None:
    seen: list[object] = []
    requests = [Request(0.0, "m", 0, 10)]
    core = Core([device(72 * GiB)], REFERENCE.specs(["m"]), endless_settings(10.0))
    Simulation(core, REFERENCE.service_s, requests, observe=lambda what, _: seen.append(what)).run()
    assert [type(what).__name__ for what in seen if isinstance(what, Event)] == ["Arrived", "EngineReady", "Finished"]
