"""Which model is loaded next, at whose expense, and how long anybody can wait for it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from scheduler.commands import Load
from scheduler.core import Core
from scheduler.eviction.base import Eviction
from scheduler.eviction.delay import ExpectedDelay
from scheduler.eviction.lru import Lru
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, Residency, SchedulerSettings
from scheduler.ordering import Ordering, worst_wait_s
from scheduler.policies.collate import Collate
from scheduler.policies.fifo import Fifo
from scheduler.policies.regret import SHARE_FIRST, TAIL_HELD, Regret
from scheduler.policies.shadow import CollateShadow
from scheduler.policies.slack import Slack
from scheduler.simulate.engine import REFERENCE, GiB, device
from scheduler.simulate.run import Simulation, endless_settings
from scheduler.simulate.traces import Request
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds, spec


def world_of(ordering: Ordering, memory: int = 1000, settings: SchedulerSettings | None = None, **sizes: int) -> World:
    specs = [spec(name, size, load_estimate_s=3.0) for name, size in sizes.items()]
    return World(Core([DeviceSpec("ram", "host", memory * MiB)], specs, settings, ordering=ordering, eviction=Lru()))


# ------------------------------------------------------------------- default


def test_the_model_that_serves_more_in_time_per_second_of_load_goes_first(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700, c=700)
    _, (load,) = w.arrive("a")
    w.arrive("b")
    w.arrive("c")
    w.arrive("c")
    (admit, *rest) = w.ready(load)
    stops = rest or w.finish(admit.ticket_id)
    assert kinds(w.stopped(stops[0])) == ["load c"]


def test_a_plan_is_revised_while_its_victim_drains(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700, c=700)
    w.resident("a")
    running, _ = w.arrive("a")
    w.arrive("b")
    assert w.core.models["a"].state is Residency.DRAINING
    for _ in range(6):
        w.arrive("c")
    (stop,) = w.finish(running)
    assert kinds(w.stopped(stop)) == ["load c"]


def test_a_victim_admits_until_its_drain_would_outlast_the_load_under_way(world: MakeWorld) -> None:
    w = world(memory=1500, a=spec("a", 700), b=spec("b", 700, load_estimate_s=60.0), c=700)
    w.resident("a")
    long_answer, _ = w.arrive("a")
    w.now += 4.0
    w.finish(long_answer)  # an answer of a takes some four seconds
    w.arrive("a")
    _, (load_b,) = w.arrive("b")
    w.arrive("c")  # needs a's memory, but b loads for a minute yet
    assert w.core.models["a"].state is Residency.READY
    assert kinds(w.arrive("a")[1])[0].startswith("admit")
    w.tick(w.now + 58.0)
    assert w.core.models["a"].state is Residency.DRAINING
    w.ready(load_b, 2.0)


def test_two_models_that_take_turns_make_progress_at_every_turn() -> None:
    """Plain slack with drains can livelock: each model is evicted for the other before it has served anybody."""
    requests = [Request(0.05 * i, f"m{i % 2}", 0, 60 + 7 * (i % 5)) for i in range(400)]
    orderings: Sequence[Ordering] = (Regret(), Regret(SHARE_FIRST), Slack(), Collate())
    for ordering in orderings:
        specs = [ModelSpec(f"m{i}", 40 * GiB, "memory", load_estimate_s=4.0) for i in range(2)]
        core = Core([device(72 * GiB)], specs, endless_settings(10.0), ordering=ordering, eviction=ExpectedDelay())
        served: list[int] = []
        loads: list[int] = []

        def watch(what: object, _now: float, served: list[int] = served, loads: list[int] = loads) -> None:
            if isinstance(what, Load):
                loads.append(len(served))
            elif type(what).__name__ == "Admit":
                served.append(1)

        Simulation(core, REFERENCE.service_s, requests, observe=watch).run()
        assert len(served) == len(requests), ordering.name
        between = [later - earlier for earlier, later in itertools.pairwise(loads)]
        assert all(between), f"{ordering.name}: a load after which nobody was served: {between}"


def test_room_that_was_made_for_a_model_is_not_taken_back_by_its_victim() -> None:
    w = world_of(Regret(), a=700, b=700)
    w.resident("a")
    _, (stop,) = w.arrive("b")
    for _ in range(50):
        w.arrive("a")
    assert kinds(w.stopped(stop)) == ["load b"]


def test_the_late_gain_weight_until_they_are_served_and_share_first_lets_them_wait_longer() -> None:
    rng = random.Random(4)
    requests = [Request(0.4 * i, f"m{min(9, int(rng.expovariate(0.6)))}", 0, 200) for i in range(700)]
    specs = [ModelSpec(f"m{i}", 24 * GiB, "memory", load_estimate_s=3.0) for i in range(10)]

    def run(ordering: Ordering) -> list[float]:
        core = Core([device(72 * GiB)], specs, endless_settings(10.0), ordering=ordering, eviction=ExpectedDelay())
        return Simulation(core, REFERENCE.service_s, requests).run().waits_s

    tail, share, collate = run(Regret()), run(Regret(SHARE_FIRST)), run(Collate())
    on_time = [sum(wait <= 10.0 for wait in waits) for waits in (collate, tail, share)]
    assert on_time[0] < on_time[1]
    assert sorted(tail)[693] < sorted(share)[693]


@pytest.mark.parametrize("setting", [TAIL_HELD, SHARE_FIRST])
def test_decisions_do_not_depend_on_where_the_clock_begins(setting: float) -> None:
    """Times in powers of two, so that a later beginning changes no sum. A clock at zero was once taken for one that
    has not begun, and every rate for hundreds of times what it was."""
    rng = random.Random(5)
    specs = [ModelSpec(f"m{i}", 24 * GiB, "memory", load_estimate_s=3.0) for i in range(8)]
    rows = [(0.5 * i, f"m{min(7, int(rng.expovariate(0.5)))}", rng.randrange(64) / 8) for i in range(300)]

    def waits(begin_s: float) -> list[float]:
        requests = [Request(begin_s + at_s, name, duration_s=long_s) for at_s, name, long_s in rows]
        core = Core([device(72 * GiB)], specs, endless_settings(10.0), ordering=Regret(setting))
        return Simulation(core, REFERENCE.service_s, requests).run().waits_s

    assert waits(0.0) == pytest.approx(waits(4096.0), abs=1e-6)


# --------------------------------------------------------------- worst waits


@pytest.mark.parametrize("make", [Regret, Slack])
@pytest.mark.parametrize("latency_class", list(LatencyClass))
def test_a_rare_model_is_served_within_its_classs_worst_wait(make: type, latency_class: LatencyClass) -> None:
    """Two favourites with a flood of requests of the shortest class, and one request for a third model."""
    settings = SchedulerSettings(
        max_wait_s=float("inf"), max_waiting=1 << 30, overdue_after=4.0, patience_s=(5.0, 10.0, 10.0, 15.0, 30.0),
        pressure_threshold=1.0,
    )  # fmt: skip
    specs = [ModelSpec(f"m{i}", 40 * GiB, "memory", 4, max_queue=1 << 30, load_estimate_s=4.0) for i in range(3)]
    requests = [Request(0.3 * i, f"m{i % 2}", 0, 60, latency_class=LatencyClass.INSTANT) for i in range(600)]
    requests.append(Request(5.0, "m2", 0, 60, latency_class=latency_class))
    core = Core([device(72 * GiB)], specs, settings, ordering=make(), eviction=ExpectedDelay())
    ahead = 0

    def watch(_what: object, now: float) -> None:
        nonlocal ahead
        if now < 5.0 + 40.0 * 30.0 and any(w.ticket.id == 600 for w in core.tickets.waiting.values()):
            ahead = max(ahead, sum(w.overdue_s <= now for w in core.tickets.waiting.values()))

    waits = Simulation(core, REFERENCE.service_s, requests, observe=watch).run().waits_s
    bound = worst_wait_s(
        settings.overdue_after * settings.patience_s[latency_class],
        models=3, load_s=4.0, service_s=1.3, ahead=ahead, sequences=4,
    )  # fmt: skip
    assert waits[600] <= bound


def test_without_the_bound_a_rare_model_would_starve() -> None:
    """The flood of the test above, under a policy that serves what can be on time, with nobody ever overdue."""
    specs = [ModelSpec(f"m{i}", 40 * GiB, "memory", 4, max_queue=1 << 30, load_estimate_s=4.0) for i in range(3)]
    requests = [Request(0.3 * i, f"m{i % 2}", 0, 60) for i in range(600)] + [Request(5.0, "m2", 0, 60)]
    waits = {}
    for overdue_after in (4.0, float("inf")):
        settings = SchedulerSettings(
            max_wait_s=float("inf"), max_waiting=1 << 30, overdue_after=overdue_after, pressure_threshold=1.0
        )
        core = Core([device(72 * GiB)], specs, settings, ordering=Slack(), eviction=ExpectedDelay())
        waits[overdue_after] = Simulation(core, REFERENCE.service_s, requests).run().waits_s[600]
    assert waits[4.0] < 120.0 < waits[float("inf")]


# ------------------------------------------------------------ to compare with


def test_fifo_lets_nobody_pass_not_even_to_a_loaded_model() -> None:
    w = world_of(Fifo(), memory=1500, a=700, b=700)
    w.resident("a")
    first, (load_b,) = w.arrive("b")
    second, commands = w.arrive("a")
    assert commands == []
    assert kinds(w.ready(load_b)) == [f"admit {first}", f"admit {second}"]


def test_fifo_goes_on_when_the_first_in_line_leaves() -> None:
    w = world_of(Fifo(), memory=1500, a=700, b=700)
    w.resident("a")
    first, _ = w.arrive("b")
    second, _ = w.arrive("a")
    assert kinds(w.cancel(first)) == [f"admit {second}"]


def test_collate_serves_what_is_loaded_and_never_disturbs_a_busy_model() -> None:
    w = world_of(Collate(), a=700, b=700)
    w.resident("a")
    first, _ = w.arrive("a")
    w.arrive("b")
    second, commands = w.arrive("a")
    assert kinds(commands) == [f"admit {second}"]
    assert w.finish(first) == []
    assert kinds(w.finish(second)) == ["stop a"]


def test_slack_takes_what_can_still_be_on_time() -> None:
    w = world_of(Slack(), settings=SchedulerSettings(patience_s=(10.0,) * 5), a=700, b=700, c=700)
    _, (load_a,) = w.arrive("a")
    w.arrive("b")
    w.arrive("b")  # two, but too late by the time that a is through
    w.now += 8.0
    w.arrive("c")
    (admit, *_) = w.ready(load_a, 0.5)
    (stop,) = w.finish(admit.ticket_id)
    assert kinds(w.stopped(stop)) == ["load c"]


def test_the_shadow_waits_as_the_rule_that_it_shadows() -> None:
    """The same arrivals through the real core under collate and through the bookkeeping: waits of one kind."""
    rng = random.Random(8)
    requests = [Request(0.5 * i, f"m{min(7, int(rng.expovariate(0.5)))}", 0, 100) for i in range(500)]
    specs = [ModelSpec(f"m{i}", 30 * GiB, "memory", load_estimate_s=3.0) for i in range(8)]
    core = Core([device(72 * GiB)], specs, endless_settings(10.0), ordering=Collate(), eviction=Lru())
    waits = sorted(Simulation(core, REFERENCE.service_s, requests).run().waits_s)
    shadow = CollateShadow(72 * GiB, 1, lambda _: (30 * GiB, 3.0, 0.3 + 100 / 60))
    for request in requests:
        shadow.arrive(request.model, request.at_s)
    assert shadow.p99_s(1e6) == pytest.approx(waits[495], rel=0.5)


def test_evictions_are_told_to_the_policy_that_chose_them() -> None:
    class Watching(Lru):
        def __init__(self) -> None:
            self.gone: list[str] = []

        def evicted(self, victim: object) -> None:
            self.gone.append(victim.model)  # type: ignore[attr-defined]

    watching = Watching()
    eviction: Eviction = watching
    specs = [spec("a", 700), spec("b", 700)]
    w = World(Core([DeviceSpec("ram", "host", 1000 * MiB)], specs, eviction=eviction))
    w.resident("a")
    w.arrive("b")
    assert watching.gone == ["a"]
